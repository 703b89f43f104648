# Tiny Shakespeare by characters, in 7 to 10 s from a standing start on two CPU cores with bf16,
# once the dataset is there: a validation loss of 1.867 nats per character (1.872 over the whole
# split; 1.872 and 1.866 with --seed=2 and 3). Tried beside it, over the whole split: 200 updates
# of 48 sequences, 1.878; 4 heads, 1.882; muon_lr=0.05, 1.873; 160 updates, 1.884; 160 of
# n_embd=160 with muon_lr=0.03, 1.3 times as long, 1.875; 260 of 32 sequences with it, 1.899.

out_dir = 'out-shakespeare-quick'
dataset = 'shakespeare_char'

eval_interval = 170  # at the start and at the end
eval_iters = 25
log_interval = 34
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
muon_lr = 0.04
muon_momentum = 0.85  # of few updates, none should be remembered for long
learning_rate = 4e-2  # AdamW's, for embeddings, head and norms: they have to come far
min_lr = 0.0
warmup_iters = 10
max_iters = 170
beta2 = 0.99  # an update sees few tokens
