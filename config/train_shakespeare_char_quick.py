# Tiny Shakespeare by characters, in seconds on two CPU cores, start-up included, once the dataset
# is there: 4.8 s with bf16 instructions, 6.7 s without them (emulated). Expect a validation loss of
# 1.863 nats per character (1.871 over the whole split; 1.885 with --seed=2); without bf16, 1.874.

out_dir = 'out-shakespeare-quick'
dataset = 'shakespeare_char'

eval_interval = 150  # at the start and at the end
eval_iters = 10  # each look takes time, too
log_interval = 30
sample_tokens = 150

model = 'llama'  # a GPT of this shape needs more than twice the updates
gradient_accumulation_steps = 1
batch_size = 64  # each update pays a price of its own, so larger and fewer than elsewhere
block_size = 32  # words are short, and 64 gives no better loss in the time
n_layer = 1  # many quick updates teach more in seconds than a few of a deeper model
n_head = 8  # of 16 numbers: 0.01 lower than 4 heads of 32
n_embd = 128
tied = False  # 65 characters: a matrix to read and one to predict them cost next to nothing

optimizer = 'muon'
muon_lr = 0.05
muon_momentum = 0.85  # of few updates, none should be remembered for long
learning_rate = 4e-2  # AdamW's, for embeddings, head and norms: they have to come far
min_lr = 0.0
schedule = 'linear'
warmup_iters = 10
max_iters = 150
beta2 = 0.99  # an update sees few tokens
