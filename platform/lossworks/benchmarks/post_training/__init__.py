"""What `lossworks bench post-training` measures: losses of fine-tuning, preferences and distillation."""
