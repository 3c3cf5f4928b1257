"""nanorl: a GPT and its post-training, to read, trust and change."""
