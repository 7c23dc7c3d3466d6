/* NVML's own names: what joins two GPUs. */
#include "calls.h"

PUBLIC int nvmlDeviceGetP2PStatus(device d, device peer, unsigned capability, unsigned *status) {
    const gpu *g;
    int code = enter_pair("nvmlDeviceGetP2PStatus", d, peer, &g);
    if (code) return code;
    if (capability >= P2P_KINDS) return INVALID_ARGUMENT;
    *status = g->p2p[capability][peer - devices];
    return OK;
}
PUBLIC int nvmlDeviceGetTopologyCommonAncestor(device d, device peer, unsigned *level) {
    const gpu *g;
    int code = enter_pair("nvmlDeviceGetTopologyCommonAncestor", d, peer, &g);
    if (!code) *level = g->ancestor[peer - devices];
    return code;
}
