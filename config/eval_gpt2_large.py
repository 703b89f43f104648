# The loss of OpenAI's gpt2-large on OpenWebText: python train.py config/eval_gpt2_large.py
# nanoGPT reports a validation loss of 2.66 for it.

init_from = 'gpt2-large'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a more precise loss
