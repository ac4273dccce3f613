"""The neural networks: language model, image tokenizer, understanding towers, and their weights on disk."""
