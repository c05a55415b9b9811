"""Heads: what is trained on kept embeddings. One module per idea; `registry` knows them by their recipe's kind."""
