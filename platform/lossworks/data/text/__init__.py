"""Text: corpora, their documents, the tokenizer, and shards of tokens in the cache folder."""
