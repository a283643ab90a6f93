"""Everything that knows Hugging Face transformers. Importing this package alone imports nothing of it."""
