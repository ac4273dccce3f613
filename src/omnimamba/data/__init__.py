"""Training data: image stores, captions, conversations, and which samples a step uses."""
