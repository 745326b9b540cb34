#!/bin/bash
# A training on a Slurm cluster, in the clone, on as many nodes as --nodes says:
#   sbatch extras/slurm.sh pretrain.py --data train.tsv
# Two minutes before the time limit Slurm sends SIGTERM; the run saves, and the job goes back into the queue.
#SBATCH --job-name=eat --nodes=1 --ntasks-per-node=1
#SBATCH --gpus-per-node=4 --cpus-per-task=32
#SBATCH --time=24:00:00 --signal=TERM@120
#SBATCH --requeue --open-mode=append
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=gpu --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:29500" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@" && exit
if [ "$(date +%s)" -gt "$((${SLURM_JOB_END_TIME:-9999999999} - 130))" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
