# The Wonderful Wizard of Oz with today's architecture: 55 s on two CPU cores with bf16
# instructions, 88 s without them (emulated). Expect a validation loss of 1.306 nats per character
# on the retelling, 1.240 on the book, where the GPT of config/train_wizard_char.py gets 1.347 and
# 1.272.

out_dir = 'out-wizard-llama'
dataset = 'wizard_char'

eval_interval = 200
eval_iters = 20
log_interval = 50
sample_tokens = 240
sample_start = 'Dorothy'

model = 'llama'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
n_layer = 2
n_head = 4
n_embd = 128
dropout = 0.1  # without, it memorizes the text: val loss at best 1.400, then rising

optimizer = 'muon'
muon_lr = 0.04
muon_weight_decay = 0.1
learning_rate = 6e-3  # AdamW's, for embeddings and norms
min_lr = 0.0
warmup_iters = 50
max_iters = 1300
beta2 = 0.99  # for updates of few tokens
