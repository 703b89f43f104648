# Tiny Shakespeare by characters, by today's architecture and optimizer: a validation loss of 1.478
# nats per character (1.473 over the whole split), after 175 s on two CPU cores with bf16, where
# config/train_shakespeare_char_cpu.py got 1.546 (1.550) in 194 s on such a one. Chance moves it by
# a hundredth. What follows was tried with Newton-Schulz's former polynomials, over the whole
# split: this, 1.472; --seed=2, 1.478; 2,500 updates, 1.488; muon_lr=0.02, 1.482; muon_lr=0.013 and
# learning_rate=8.5e-3, 1.479; batch_size=8 and 2,120 updates, 1.485; batch_size=4, muon_lr=0.011,
# learning_rate=7e-3, 3,600 updates, 1.489. Before, for 2,000 updates of 8 with gate and up as one
# matrix:
# muon_lr=0.02, 1.471, and then learning_rate=2e-2, 1.480, or 6e-3, 1.483. With 6e-3, muon_lr=0.02
# and exactly q, k, v, gate and up as Muon's pieces, 1.479; that with tied=True, 1.493, with
# dropout=0.05, 1.495, with muon_lr=0.03, 1.492, with muon_steps=5, 1.481. With 6e-3 and
# torch.optim.Muon at 0.02, 1.501, tied 1.497; this with 5 layers of 80 and 5 heads, 1.495, 3
# layers of 128, 1.514, muon_weight_decay=0.2, 1.501, block_size=512 and batch_size=4, 1.512.

out_dir = 'out-shakespeare-llama'
dataset = 'shakespeare_char'

eval_interval = 650
eval_iters = 25
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
max_iters = 2600
beta2 = 0.99  # an update sees few tokens
