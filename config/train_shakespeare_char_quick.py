# Tiny Shakespeare by characters, in 8 to 17 s from a standing start on two CPU cores with bf16,
# once the dataset is there: a validation loss of 1.870 nats per character.

out_dir = 'out-shakespeare-quick'
dataset = 'shakespeare_char'

eval_interval = 300
eval_iters = 25
log_interval = 100
sample_tokens = 150

gradient_accumulation_steps = 1
batch_size = 32
block_size = 32  # words are short; half the context is twice the updates
n_layer = 1  # many quick updates teach more in seconds than a few of a deeper model
n_head = 4
n_embd = 128

learning_rate = 6e-3  # small models like it high; at 8e-3 one seed of three goes astray
min_lr = 0.0
warmup_iters = 50
max_iters = 900
beta2 = 0.99  # an update sees few tokens
