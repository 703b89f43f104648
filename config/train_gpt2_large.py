# GPT-2 large (774M) on OpenWebText: as config/train_gpt2.py, but for what is set here.
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_large.py
# No loss to expect yet: it has not been measured.

out_dir = 'out-gpt2-large'
wandb_run_name = 'gpt2-large'

model_size = 'gpt2-large'
batch_size = 4
gradient_accumulation_steps = 16 * 8  # half a million tokens again
learning_rate = 2.5e-4  # GPT-3's for this size: larger models like it lower
min_lr = 2.5e-5
