"""Talks about an image, saves the conversation and goes on from the file: `python examples/conversation.py IMAGE [MODEL]`.

The file holds the model's whole state after the last answer, so nothing is read again.
"""

import sys

from omnimamba import OmniMamba

image, source = sys.argv[1], (sys.argv[2:] or ["nano"])[0]
model = OmniMamba.from_pretrained(source)

conversation = model.chat(image)
for piece in conversation.ask("What is this?", stream=True):
    print(piece, end="", flush=True)
print()
conversation.save("conversation.safetensors")

later = model.load_conversation("conversation.safetensors")
print(later.ask("What style is this drawing in?"))
print(later.messages)
