# Tiny Shakespeare by characters, with nanoGPT's hyperparameters: its "baby GPT", for a GPU.
# Its loss has not been measured here yet; nanoGPT reports 1.47 in 3 minutes on an A100. Two CPU
# cores, at 4,000 to 9,000 tokens/s, would need about 2.5 to 6 hours, and more with dropout.
# For a CPU there are train_shakespeare_char_quick.py and train_shakespeare_char_cpu.py.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits, so save only improvements

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # without dropout, it soon memorizes a small text

learning_rate = 1e-3  # small models learn better with a high one
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # for updates of few tokens
