# Tiny Shakespeare by characters, in 11 to 16 s from a standing start on two CPU cores with bf16,
# once the dataset is there: a validation loss of 1.873 nats per character (1.891 over the whole
# split). A GPT of this shape takes 900 updates and 1.4 times as long for 1.870 (1.878).

out_dir = 'out-shakespeare-quick'
dataset = 'shakespeare_char'

eval_interval = 165
eval_iters = 25
log_interval = 55
sample_tokens = 150

model = 'llama'  # a GPT of this shape needs more than twice the updates
gradient_accumulation_steps = 1
batch_size = 32
block_size = 32  # words are short, and 64 gives no better loss in the time
n_layer = 1  # many quick updates teach more in seconds than a few of a deeper model
n_head = 4
n_embd = 128
tied = False  # 65 characters: a matrix to read and one to predict them cost next to nothing

optimizer = 'muon'
muon_lr = 0.03
muon_momentum = 0.9  # of few updates, none should be remembered for long
muon_steps = 3  # rougher updates, but more of them in the time
learning_rate = 3e-2  # AdamW's, for embeddings, head and norms: they have to come far
min_lr = 0.0
warmup_iters = 10
max_iters = 330
beta2 = 0.99  # an update sees few tokens
