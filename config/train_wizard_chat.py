# A small Llama that learns to answer questions about Oz, to translate, to spell and to add: 91 s
# on two CPU cores with bf16 instructions, 162 s without them (emulated). Of the 289 held-out
# questions it answers 0.907 exactly right, and 0.858 if trained without bf16. With
# --max_iters=3600, and bf16, 0.920.

out_dir = 'out-wizard-chat'
dataset = 'wizard_chat'

eval_interval = 650
eval_iters = 20
log_interval = 100
sample_start = 'What did the Scarecrow wish for?'  # not in the training data in exactly this form
sample_tokens = 40

model = 'llama'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # one or two conversations: they have 58 characters on average
n_layer = 2
n_head = 8
n_embd = 128
tied = False  # an alphabet is small: a matrix to read and one to predict cost next to nothing

optimizer = 'muon'
muon_lr = 0.04
muon_weight_decay = 0.3  # high: it is to find rules, not to know all questions by heart
learning_rate = 1e-2  # AdamW's, for embeddings, head and norms
min_lr = 0.0
warmup_iters = 50
max_iters = 2600
beta2 = 0.99  # an update sees few answers
