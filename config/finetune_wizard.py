# Fine-tune a model of your own: one that was trained on Shakespeare, on the Wizard of Oz.
# First: python train.py config/train_shakespeare_char.py
# With --init_from=out-cpu (see NOTES.md) it takes 22 s on two CPU cores with bf16, and the
# validation loss falls to 1.768.
#
# Characters of both texts keep their embeddings; those of new ones, such as curly quotes, are
# initialized. The shape of the model comes from the checkpoint.

init_from = 'out-shakespeare-char'  # a checkpoint, its folder, or gpt2 for OpenAI's weights
out_dir = 'out-finetune-wizard'
dataset = 'wizard_char'

eval_interval = 50
eval_iters = 20
log_interval = 10
sample_start = 'Dorothy'

gradient_accumulation_steps = 1
batch_size = 32
block_size = 64  # at most the checkpoint's
dropout = 0.1

learning_rate = 3e-4  # a third of the original peak, so that it adapts without forgetting
min_lr = 3e-5
warmup_iters = 10
max_iters = 300
beta2 = 0.99
