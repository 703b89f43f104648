# Fine-tune OpenAI's largest GPT-2 on Shakespeare, for a few updates: on a GPU with 40 GB, after
# pip install transformers. With less memory or time: --init_from=gpt2 or gpt2-medium.
# Its time and loss have not been measured yet.

init_from = 'gpt2-xl'
out_dir = 'out-shakespeare'
dataset = 'shakespeare'

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it soon overfits
wandb_project = 'shakespeare'
wandb_run_name = 'finetune-gpt2-xl'

batch_size = 1
gradient_accumulation_steps = 32  # 32 x 1024 = 32,768 tokens an update, 9 updates an epoch
max_iters = 20
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
