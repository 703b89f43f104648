# Tiny Shakespeare by characters, with nanoGPT's hyperparameters: its "baby GPT", for a GPU.
# Its loss is not measured here yet (nanoGPT reports 1.47 in 3 minutes on an A100); on two CPU
# cores at 4,000 to 9,000 tokens/s it would take six to two and a half hours, longer with dropout.
# For a CPU there are train_shakespeare_char_quick.py and train_shakespeare_char_cpu.py.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits, so ckpt.pt follows the best as best.pt does

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # a small text is soon known by heart

learning_rate = 1e-3  # small models like it high
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # an update sees few tokens
