# The baseline that attention has to beat: predict each character from the previous one alone.
# It takes seconds on two CPU cores. Expect a validation loss of 2.342 nats per character on the
# retelling, 2.329 on the book.

out_dir = 'out-wizard-bigram'
dataset = 'wizard_char'
model = 'bigram'

eval_interval = 100
eval_iters = 0  # the whole split: it is small
log_interval = 50
sample_tokens = 120

block_size = 64  # only the number of pairs in a sequence: a bigram looks back on one token
batch_size = 256  # many pairs at once, since there is little to compute
gradient_accumulation_steps = 1
weight_decay = 0.0  # a table of logits need not be small

learning_rate = 0.1  # large, since each row of the table gets few updates
min_lr = 1e-3
warmup_iters = 0
max_iters = 500
beta2 = 0.99
