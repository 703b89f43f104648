# Tiny Shakespeare by characters, by today's architecture and optimizer: a validation loss of 1.515
# nats per character, after 192 s on two slow CPU cores with bf16, where
# config/train_shakespeare_char_cpu.py gets 1.546 in 177 s.
# Tried, over the whole split: 2,800 updates of width 128 and five Newton-Schulz steps, 1.528;
# 2,200 of width 160, 1.526; 1,100 of width 256, 1.568; at width 128 also dropout 0.1, 1.566, and
# weight decay 0.4, 1.539.

out_dir = 'out-shakespeare-llama'
dataset = 'shakespeare_char'

eval_interval = 500
eval_iters = 25
log_interval = 100
sample_tokens = 150

model = 'llama'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
n_layer = 2
n_head = 5
n_embd = 160

optimizer = 'muon'
muon_lr = 0.03
muon_weight_decay = 0.1
muon_steps = 3  # rougher updates, but more of them in the time
learning_rate = 6e-3  # AdamW's, for embeddings and norms
min_lr = 0.0
warmup_iters = 50
max_iters = 2400
beta2 = 0.99  # an update sees few tokens
