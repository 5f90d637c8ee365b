"""Tokenizers, token shards on disk, and the loader that reads them in windows."""
