"""One process that answers questions about images and paints images for many users: OpenAI-compatible API and web page."""
