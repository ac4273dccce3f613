"""Training: recipes, stages and one loop, for the language model, the image tokenizer and the towers of small models."""
