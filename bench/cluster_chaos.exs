# Requests from two nodes to the engines of one name on three, while these are killed, stopped, cut off and drained;
# then the account of it. Ends with status 1 where an answer is wrong, a request was lost that need not be, none of
# its ends came in time, or anything is left. Five BEAMs on loopback; the engines answer from a script.
#
#     MIX_ENV=test mix run bench/cluster_chaos.exs
#     MIX_ENV=test mix run bench/cluster_chaos.exs --seed 7 --requests 2000
#     MIX_ENV=test mix run bench/cluster_chaos.exs --links --requests 1000 --callers 12    # as root
#
#   --seed      what the requests and the order of faults follow from (1)
#   --requests  how many are made (10,000); those of five prompts count once
#   --callers   processes on each of the two nodes (24)
#   --rest      milliseconds that a caller rests between two requests, at most (2000)
#   --pause     usual milliseconds between two faults (1500)
#   --links     in network namespaces (test/support/switch.py), whose links are cut without a word, late, lossy and slow

Logger.configure(level: :error)

{options, [], []} =
  OptionParser.parse(System.argv(),
    strict:
      [links: :boolean] ++
        for(name <- [:seed, :requests, :callers, :rest, :pause], do: {name, :integer})
  )

{links, options} = Keyword.pop(options, :links, false)

# What says nothing is given up after 8 to 10 seconds.
network =
  if links,
    do: %{network: VLLM.Network.start_link(5), kernel: [net_ticktime: 8]},
    else: %{}

defaults = %{seed: 1, requests: 10_000, callers: 24, rest: 2_000, pause: 1_500}
started_at = System.monotonic_time(:second)
account = defaults |> Map.merge(network) |> Map.merge(Map.new(options)) |> VLLM.ClusterChaos.run()
IO.puts("#{System.monotonic_time(:second) - started_at} s")
IO.puts(VLLM.ClusterChaos.describe(account))
if account.violations != [], do: System.halt(1)
