# shellcheck shell=bash
# Sourced by the batch scripts of this folder: what differs between clusters. Edit it, or set these variables where
# sbatch is called; it hands its environment to the job, each time that the job starts.
#
#   ACTIVATE    a file to source that makes `python` the right one: bin/activate of a virtual environment, or a file of
#               `module load` lines. It lies where every node sees it.
#   CONTAINER   pyxis or apptainer, in place of ACTIVATE
#   IMAGE       what the container is made from: a .sqsh file or registry path, a .sif file
#   MOUNTS      folders that the container sees besides the repository and RUN_DIR: /data:/data,/scratch:/scratch
#   INTERFACE   the network interface of NCCL and gloo, such as ib0; empty: they choose
#   PATIENCE_S  seconds that the other processes have to end when one of them has ended
#
# Leaves two arrays, one of which is empty: `container`, srun's options, and `wrapper`, which stands before the command.

: "${ACTIVATE:=}"
: "${CONTAINER:=}"
: "${IMAGE:=}"
: "${MOUNTS:=}"
: "${INTERFACE:=}"
: "${PATIENCE_S:=120}"

# Ends the job: this is no training that would go on if it were queued again.
refuse() {
    echo "megadit: $1" >&2
    exit 2
}

[[ -f megadit/train.py ]] || refuse "$PWD is not the repository: call sbatch from its root, or with --chdir"

mounts=$PWD:$PWD${RUN_DIR:+,$RUN_DIR:$RUN_DIR}${MOUNTS:+,$MOUNTS}
container=() wrapper=()
# shellcheck disable=SC2034 # both are for the scripts that source this file
case $CONTAINER in
    "")
        [[ -n $ACTIVATE ]] || refuse "set ACTIVATE to the file that activates the environment, or CONTAINER and IMAGE"
        [[ -f $ACTIVATE ]] || refuse "ACTIVATE=$ACTIVATE is not a file on $(hostname)"
        # shellcheck disable=SC1090 # the site's own
        source "$ACTIVATE"
        ;;
    pyxis) container=(--container-image="$IMAGE" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    apptainer) wrapper=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$IMAGE") ;;
    *) refuse "CONTAINER=$CONTAINER is neither pyxis nor apptainer" ;;
esac
[[ -z $CONTAINER || -n $IMAGE ]] || refuse "CONTAINER=$CONTAINER needs IMAGE, what the container is made from"

if [[ -n $INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
# srun does not take over sbatch's --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
