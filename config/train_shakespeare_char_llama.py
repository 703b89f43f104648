# Tiny Shakespeare by characters, by today's architecture and optimizer: a validation loss of 1.481
# nats per character (1.497 over the whole split), after 170 s on two slow CPU cores with bf16,
# where config/train_shakespeare_char_cpu.py got 1.546 (1.550) in 192 s. With 5 layers of 80, 5
# heads and 3,000 updates it is 1.470 over the whole split, in more than twice the time.
# Tried, over the whole split. In about this time: 3 layers of 128, 1.514; 5 of 80 with 2 heads,
# 1.510; learning_rate=1.5e-2, 1.508; muon_momentum=0.9, 1.497; muon_weight_decay=0.2, 1.501. With
# 2,450 updates 1.495, with muon_weight_decay=0.05 besides 1.502. In more time, muon_lr=0.03:
# context 128 and 2 layers of 160, 1.526, of 128 with dropout 0.1, 1.566, or weight decay 0.4,
# 1.539; context 256 and 2 layers of 160, 1.511; 3 of 128, 1.498; 4 of 96, 1.491; 6 of 96, 1.494.

out_dir = 'out-shakespeare-llama'
dataset = 'shakespeare_char'

eval_interval = 500
eval_iters = 25
log_interval = 100
sample_tokens = 150

model = 'llama'
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256  # twice the GPT's: a Llama makes more of it
n_layer = 4
n_head = 3
n_embd = 96

optimizer = 'muon'
muon_lr = 0.02
muon_weight_decay = 0.1
muon_steps = 3  # rougher updates, but more of them in the time
learning_rate = 6e-3  # AdamW's, for embeddings and norms
min_lr = 0.0
warmup_iters = 50
max_iters = 2000
beta2 = 0.99  # an update sees few tokens
