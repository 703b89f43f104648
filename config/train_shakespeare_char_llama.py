# Tiny Shakespeare by characters, by today's architecture and optimizer: a validation loss of LOSS
# nats per character, after SECS s on two slow CPU cores with bf16, where
# config/train_shakespeare_char_cpu.py gets 1.546 in 177 s.
# Deep and narrow pays here, and a long context. Tried, with as much arithmetic, over the whole
# split: context 128 and two layers of width 160, 1.526; of 256, 1.568; of 128 with dropout 0.1,
# 1.566, or weight decay 0.4, 1.539. With context 256: two layers of 160, 1.511; three of 128, 1.498;
# four of 128, 1.503; four of 96, 1.491; six of 96, 1.494; six of 64, 1.496; five of 80, 1.479, and
# 1.470 with muon_lr=0.02 instead of 0.03.

out_dir = 'out-shakespeare-llama'
dataset = 'shakespeare_char'

eval_interval = 600
eval_iters = 25
log_interval = 100
sample_tokens = 150

model = 'llama'
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256
n_layer = 5
n_head = 5
n_embd = 80

optimizer = 'muon'
muon_lr = 0.02
muon_weight_decay = 0.1
muon_steps = 3  # rougher updates, but more of them in the time
learning_rate = 6e-3  # AdamW's, for embeddings and norms
min_lr = 0.0
warmup_iters = 50
max_iters = 3000
beta2 = 0.99  # an update sees few tokens
