# The loss of OpenAI's gpt2 on OpenWebText: python train.py config/eval_gpt2.py
# nanoGPT reports a validation loss of 3.11 for it.

init_from = 'gpt2'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a more precise loss
