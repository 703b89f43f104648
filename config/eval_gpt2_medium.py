# The loss of OpenAI's gpt2-medium on OpenWebText: python train.py config/eval_gpt2_medium.py
# nanoGPT reports a validation loss of 2.84 for it.

init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a more precise loss
