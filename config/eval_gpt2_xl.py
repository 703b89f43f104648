# The loss of OpenAI's gpt2-xl on OpenWebText: python train.py config/eval_gpt2_xl.py
# nanoGPT reports a validation loss of 2.56 for it.

init_from = 'gpt2-xl'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a more precise loss
