# Tiny Shakespeare by characters, as well as two CPU cores with bf16 and a GPT allow in one and a
# half to three minutes: a validation loss of 1.546 nats per character, after 194 s on slow cores.

out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'

eval_interval = 920
eval_iters = 25
log_interval = 100
sample_tokens = 150

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
n_layer = 2  # three or four learn more from an update, but make too few of them in the time
n_head = 4
n_embd = 128

learning_rate = 6e-3  # small models like it high
min_lr = 0.0
warmup_iters = 100
max_iters = 4600
weight_decay = 0.2  # it sees the text nine times
beta2 = 0.99  # an update sees few tokens
