# Tiny Shakespeare by characters, by today's architecture and optimizer, in 74 s on two CPU cores
# with bf16 instructions, 117 s without them (emulated): a validation loss of 1.511 nats per
# character (1.499 over the whole split). More updates learn more: 1.473 over the whole split with
# --max_iters=2600. Chance moves a loss by a hundredth.

out_dir = 'out-shakespeare-llama'
dataset = 'shakespeare_char'

eval_interval = 900
eval_iters = 20
log_interval = 100
sample_tokens = 150

model = 'llama'
gradient_accumulation_steps = 1
batch_size = 6  # 8 learn more from an update, but make too few of them in the time
block_size = 256  # twice the GPT's: a Llama makes more of it
n_layer = 4
n_head = 3
n_embd = 96
tied = False  # 65 characters: a matrix to read and one to predict them cost next to nothing

optimizer = 'muon'
muon_lr = 0.015
muon_weight_decay = 0.1
learning_rate = 1e-2  # AdamW's, for embeddings, head and norms
min_lr = 0.0
warmup_iters = 50
max_iters = 1800
beta2 = 0.99  # an update sees few tokens
