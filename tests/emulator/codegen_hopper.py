"""Emitters of the Hopper instructions: mbarrier, bulk copies, wgmma, clusters."""
