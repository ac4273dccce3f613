"""From what a user has to what the model reads, and back: text and ids, images and pixels, questions and prompt layouts."""
