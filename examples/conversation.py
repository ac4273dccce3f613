"""Talks about an image, saves the conversation and goes on from the file: `python examples/conversation.py IMAGE [MODEL]`.

The file holds the model's whole state after the last answer, so nothing is read again.
"""

import argparse

from omnimamba import OmniMamba


def talk(image: str, source: str) -> None:
    model = OmniMamba.from_pretrained(source)

    conversation = model.chat(image)
    for piece in conversation.ask("What is this?", stream=True):
        print(piece, end="", flush=True)
    print()
    conversation.save("conversation.safetensors")

    later = model.load_conversation("conversation.safetensors")
    print(later.ask("What style is this drawing in?"))
    print(later.messages)


parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
parser.add_argument("image")
parser.add_argument("model", nargs="?", default="nano")
args = parser.parse_args()
try:
    talk(args.image, args.model)
except (OSError, ValueError) as error:
    parser.error(str(error))
