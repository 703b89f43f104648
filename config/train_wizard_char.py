# The Wonderful Wizard of Oz, character by character: 32 s on two CPU cores with bf16 instructions,
# 74 s without them (emulated). Expect a validation loss of 1.347 nats per character on the
# retelling, 1.272 on the book; over the whole split, 1.341 and 1.285. A bigram gets 2.342 and
# 2.329. On a GPU a larger model is trained; its loss is not measured here.

import torch

out_dir = 'out-wizard-char'
dataset = 'wizard_char'

eval_interval = 175
eval_iters = 20
log_interval = 50
sample_tokens = 240
sample_start = 'Dorothy'

gradient_accumulation_steps = 1
beta2 = 0.99  # an update sees few tokens
warmup_iters = 50

if torch.cuda.is_available():
    batch_size = 64
    block_size = 256
    n_layer, n_head, n_embd = 6, 6, 384
    dropout = 0.3  # the book is short, and this model could learn it by heart
    learning_rate = 2e-3
    min_lr = 1e-4
    max_iters = 1500
else:
    batch_size = 16
    block_size = 128
    n_layer, n_head, n_embd = 4, 4, 128
    dropout = 0.0  # it stops before it overfits, and random numbers are slow on a CPU
    optimizer = 'muon'  # learns as much as AdamW from less than half the updates
    muon_lr = 0.03
    learning_rate = 5e-3  # AdamW's, for embeddings and norms: small models like it high
    min_lr = 0.0
    max_iters = 700
