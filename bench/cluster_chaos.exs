# Requests from two nodes to the engines of one name on three, while these are killed, stopped, cut off and drained;
# then the account of it. Ends with status 1 where an answer is wrong, a request was lost that need not be, none of
# its ends came in time, or anything is left. Five BEAMs on loopback; the engines answer from a script.
#
#     MIX_ENV=test mix run bench/cluster_chaos.exs
#     MIX_ENV=test mix run bench/cluster_chaos.exs --seed 7 --requests 2000
#
#   --seed      what the requests and the order of faults follow from (1)
#   --requests  how many are made (10,000); those of five prompts count once
#   --callers   processes on each of the two nodes (24)
#   --rest      milliseconds that a caller rests between two requests, at most (2000)
#   --pause     usual milliseconds between two faults (1500)

Logger.configure(level: :error)

{options, [], []} =
  OptionParser.parse(System.argv(),
    strict: for(name <- [:seed, :requests, :callers, :rest, :pause], do: {name, :integer})
  )

defaults = %{seed: 1, requests: 10_000, callers: 24, rest: 2_000, pause: 1_500}
started_at = System.monotonic_time(:second)
account = VLLM.ClusterChaos.run(Map.merge(defaults, Map.new(options)))
IO.puts("#{System.monotonic_time(:second) - started_at} s")
IO.puts(VLLM.ClusterChaos.describe(account))
if account.violations != [], do: System.halt(1)
