// What this CPU and operating system can run. Built without -m flags, so that it runs anywhere.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace dynprune {

// Feature name -> present and enabled by the operating system.
std::map<std::string, bool> cpu_features();

// The instruction sets that were built in and that this machine runs, slowest first; "scalar" is always there.
std::vector<std::string> available_isas();

// The instruction set to use: DYNPRUNE_MAX_ISA where it is set, else the fastest available. Throws std::invalid_argument where the
// variable names one that is unknown or that this machine lacks.
std::string choose_isa();

}  // namespace dynprune
