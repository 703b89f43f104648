# GPT-2 xl (1558M) on OpenWebText: config/train_gpt2.py with the changes below.
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_xl.py
# Its loss has not been measured yet.

out_dir = 'out-gpt2-xl'
wandb_run_name = 'gpt2-xl'

model_size = 'gpt2-xl'
batch_size = 2
gradient_accumulation_steps = 32 * 8  # about 0.5 M tokens, as before
learning_rate = 2e-4  # GPT-3's for this size: larger models need a lower one
min_lr = 2e-5
