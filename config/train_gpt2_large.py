# GPT-2 large (774M) on OpenWebText: config/train_gpt2.py with the changes below.
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_large.py
# Its loss has not been measured yet.

out_dir = 'out-gpt2-large'
wandb_run_name = 'gpt2-large'

model_size = 'gpt2-large'
batch_size = 4
gradient_accumulation_steps = 16 * 8  # about 0.5 M tokens, as before
learning_rate = 2.5e-4  # GPT-3's for this size: larger models need a lower one
min_lr = 2.5e-5
