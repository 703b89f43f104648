# Tiny Shakespeare by characters, by a GPT, in 49 s on two CPU cores with bf16 instructions, 103 s
# without them (emulated): a validation loss of 1.533 nats per character (1.542 over the whole
# split).

out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'

eval_interval = 500
eval_iters = 20
log_interval = 100
sample_tokens = 150

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
n_layer = 2  # three or four learn more from an update, but make too few of them in the time
n_head = 4
n_embd = 128

optimizer = 'muon'  # learns as much as AdamW from less than half the updates
muon_lr = 0.03
learning_rate = 6e-3  # AdamW's, for embeddings and norms: small models like it high
min_lr = 0.0
schedule = 'linear'
warmup_iters = 100
max_iters = 2000
weight_decay = 0.2  # AdamW's
beta2 = 0.99  # an update sees few tokens
