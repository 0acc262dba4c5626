"""A teacher's targets on disk: `manifest` says whose and of what, `encoding` how rows become bytes, `shards` where.

FOLDER/manifest.json              what the cache is; read without torch
FOLDER/tokenizer/                 that the examples were made with (language models)
FOLDER/head.safetensors           the teacher's output head (hidden states)
FOLDER/shard-00000.safetensors    rows of some examples, with a checksum
FOLDER/shard-00000.claim          a process is writing it
"""
