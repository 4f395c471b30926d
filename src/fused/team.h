// One parallel region for a whole call: a decoding step has some hundred short parallel parts, and
// waking a pool for each of them costs more than the part.
#pragma once

#include <functional>

#include "lowbit/threads.h"

namespace lowbit {

// Calls body(team) in one of the threads of `threads`, while the others wait in it for what the
// body gives the team to run. They wait spinning, and give way to other threads of the machine
// after some microseconds. Nothing is lost where `threads` does not run its tasks at the same time:
// the thread that gives the team work does what nobody else has taken.
void with_team(const Threads& threads, const std::function<void(const Threads& team)>& body);

}  // namespace lowbit
