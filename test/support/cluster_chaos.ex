defmodule VLLM.ClusterChaos do
  @moduledoc """
  Requests from several nodes to one name that several others serve, while these are killed, stopped,
  cut off and drained; then the account of it. The engines answer from a script, each prompt with
  something of its own, so that an answer to another one shows.
  """

  import VLLM.OSProcess, only: [eventually: 2]

  alias VLLM.{Error, Network, Peers}

  @name VLLM.ClusterChaos.Engine

  # When a request must have ended, in ms, and how much later its caller may hear of it.
  @timeout 30_000
  @late 1_000

  # How long a node may need to be known again, in ms, on a machine that is busy.
  @patience 60_000

  @kinds [:one, :one, :one, :retried, :retried, :retried] ++
           [:list, :many, :stream, :left, :impatient, :killed]

  @faults [:kill, :stop, :cut, :drain]

  # Over a `VLLM.Network`.
  @faults_of_links [:unplug, :kill, :late, :lossy, :stop, :slow]

  @doc """
  Has `requests` made by `callers` processes on each of two nodes, of three with engines, and one fault
  after another beside them, about `pause` ms apart. Returns the account; what is wrong is among its `violations`.
  With `network:`, one of five, and `kernel:` as for `VLLM.Peers.launch/2`, the links' faults are among these.
  """
  def run(%{seed: seed, requests: requests, callers: callers} = options) do
    over = options |> Map.take([:network, :kernel]) |> Keyword.new()
    {engines, nodes} = Enum.split(Peers.launch([:a, :b, :c, :x, :y], over), 3)
    for engine <- engines, do: serve(engine)
    names = for engine <- engines, do: engine.node
    for node <- nodes, do: cluster(node, names)
    for node <- nodes, do: await_all(node, names)

    tasks =
      for {node, n} <- Enum.with_index(nodes) do
        args = [seed + n, div(requests, 2 * callers), callers, options.rest]
        Task.async(fn -> :peer.call(node.peer, __MODULE__, :call_all, args, :infinity) end)
      end

    :rand.seed(:exsss, seed)
    {engines, faults} = inject(engines, nodes, tasks, options, [])
    ends = Enum.flat_map(tasks, &Task.await(&1, :infinity))
    for node <- nodes, do: await_all(node, names)
    left = Enum.flat_map(engines ++ nodes, &left/1)
    for peer <- engines ++ nodes, do: Peers.kill(peer)

    %{
      ends: ends |> Enum.map(fn {kind, what, _late} -> {kind, what} end) |> Enum.frequencies(),
      latest: ends |> Enum.map(&elem(&1, 2)) |> Enum.max(),
      faults: Enum.frequencies(faults),
      violations: violations(ends) ++ left
    }
  end

  defp serve(peer) do
    Peers.serve(peer, VLLM.Test,
      name: @name,
      script: &__MODULE__.reply/1,
      max_in_flight: 8,
      max_queue: 64
    )
  end

  defp cluster(peer, nodes),
    do: Peers.cluster(peer, name: @name, nodes: nodes, silent_after: 1_500)

  defp await_all(peer, names) do
    ready = Map.new(names, &{&1, :ready})

    true =
      eventually(
        fn -> Peers.call(peer, VLLM.Cluster, :nodes, [@name]) == {:ok, ready} end,
        @patience
      )
  end

  @doc "What the engines answer to a prompt of `call_all/4`, after a while."
  def reply(request) do
    [id, delay] = String.split(request.prompt, " ")
    {:delay, String.to_integer(delay), {:deltas, [id, " is ", id]}}
  end

  ## The callers' side

  @doc """
  Has `callers` processes make `count` requests each, with a rest of up to `rest` ms between two. Returns of
  each what kind it was, how it ended, and how many ms after its deadline.
  """
  def call_all(seed, count, callers, rest) do
    1..callers
    |> Enum.map(fn caller ->
      Task.async(fn ->
        :rand.seed(:exsss, {seed, caller, 0})

        ends =
          for n <- 1..count do
            Process.sleep(:rand.uniform(rest + 1) - 1)
            call(Enum.random(@kinds), "#{seed}-#{caller}-#{n}")
          end

        # What came to nobody.
        {:messages, messages} = Process.info(self(), :messages)
        if messages == [], do: ends, else: [{:mailbox, :not_empty, 0} | ends]
      end)
    end)
    |> Task.await_many(:infinity)
    |> Enum.concat()
  end

  defp call(kind, id) do
    timeout = if kind == :impatient, do: :rand.uniform(300), else: @timeout
    started_at = System.monotonic_time(:millisecond)
    what = ask(kind, id, timeout)
    {kind, what, System.monotonic_time(:millisecond) - started_at - timeout}
  end

  defp ask(:killed, id, timeout) do
    caller = spawn(fn -> VLLM.generate(@name, prompt(id), timeout: timeout, retry: true) end)
    Process.sleep(:rand.uniform(200))
    Process.exit(caller, :kill)
    :left
  end

  defp ask(:left, id, timeout) do
    case Enum.take(VLLM.stream(@name, prompt(id), timeout: timeout, retry: true), 1) do
      [{:ok, %{text: ^id}}] -> :left
      [{:error, error}] -> error.reason
      other -> {:wrong, other}
    end
  end

  defp ask(:stream, id, timeout) do
    deltas = Enum.to_list(VLLM.stream(@name, prompt(id), timeout: timeout, retry: true))
    text = for {:ok, delta} <- deltas, into: "", do: delta.text

    case List.last(deltas) do
      {:error, error} ->
        if String.starts_with?(answer(id), text), do: error.reason, else: {:wrong, text}

      {:ok, _} ->
        right([text], [id])
    end
  end

  defp ask(kind, id, timeout) when kind in [:list, :many] do
    ids = for n <- 1..5, do: "#{id}-#{n}"
    options = [timeout: timeout, retry: true]
    prompts = Enum.map(ids, &prompt/1)

    if kind == :list do
      VLLM.generate(@name, prompts, options) |> outcome(ids)
    else
      answers = @name |> VLLM.generate_stream(prompts, options) |> Enum.sort()
      indexes = for {index, _} <- answers, do: index

      case Enum.find(answers, &match?({_, {:error, _}}, &1)) do
        _any when indexes != [0, 1, 2, 3, 4] -> {:wrong, indexes}
        {_index, error} -> outcome(error, ids)
        nil -> outcome({:ok, for({_, {:ok, output}} <- answers, do: output)}, ids)
      end
    end
  end

  defp ask(kind, id, timeout) do
    options = [timeout: timeout, retry: kind == :retried]
    @name |> VLLM.generate(prompt(id), options) |> outcome([id])
  end

  defp outcome({:ok, outputs}, ids), do: right(VLLM.text(outputs), ids)
  defp outcome({:error, %Error{reason: reason}}, _ids), do: reason

  defp right(texts, ids),
    do: if(texts == Enum.map(ids, &answer/1), do: :right, else: {:wrong, texts})

  defp prompt(id), do: "#{id} #{:rand.uniform(300)}"
  defp answer(id), do: "#{id} is #{id}"

  ## Faults

  defp inject(engines, nodes, tasks, options, faults) do
    Process.sleep(div(options.pause, 2) + :rand.uniform(options.pause))

    if Enum.any?(tasks, &Process.alive?(&1.pid)) do
      kinds = if options[:network], do: @faults_of_links, else: @faults
      fault = Enum.at(kinds, rem(length(faults), length(kinds)))
      index = :rand.uniform(length(engines)) - 1
      link = {options[:network], index + 1}
      engine = fault(fault, Enum.at(engines, index), nodes, link)
      inject(List.replace_at(engines, index, engine), nodes, tasks, options, [fault | faults])
    else
      {engines, faults}
    end
  end

  defp fault(:kill, engine, _nodes, _link) do
    Peers.kill(engine)
    Process.sleep(:rand.uniform(1_000))
    engine = Peers.again(engine)
    serve(engine)
    engine
  end

  # Some for so short that nobody sees it, others for long.
  defp fault(:stop, engine, _nodes, _link) do
    Peers.pause(engine)
    Process.sleep(:rand.uniform(4_000))
    Peers.resume(engine)
    engine
  end

  defp fault(:cut, engine, nodes, _link) do
    node = Enum.random(nodes)
    cookie = String.to_atom(engine.net.cookie)
    Peers.call(engine, :erlang, :set_cookie, [node.node, :another])
    Peers.call(engine, Node, :disconnect, [node.node])
    Process.sleep(:rand.uniform(2_000))
    Peers.call(engine, :erlang, :set_cookie, [node.node, cookie])
    engine
  end

  defp fault(:drain, engine, _nodes, _link) do
    :ok = Peers.call(engine, VLLM, :drain, [@name, 1])
    Process.sleep(:rand.uniform(1_000))
    :ok = Peers.call(engine, VLLM, :restart, [@name])
    engine
  end

  # Some for less than the distribution takes to notice, others for longer.
  defp fault(:unplug, engine, _nodes, link), do: disturb(engine, link, [up: 0], 12_000)
  defp fault(:late, engine, _nodes, link), do: disturb(engine, link, [delay: 0.1], 4_000)
  defp fault(:lossy, engine, _nodes, link), do: disturb(engine, link, [loss: 0.05], 4_000)
  defp fault(:slow, engine, _nodes, link), do: disturb(engine, link, [rate: 125_000], 4_000)

  defp disturb(engine, {network, n}, settings, longest) do
    Network.link(network, n, settings)
    Process.sleep(:rand.uniform(longest))
    Network.link(network, n)
    engine
  end

  ## The account

  defp violations(ends) do
    for {kind, what, late} = one <- ends, wrong?(kind, what) or late > @late, do: one
  end

  # Nothing but a lost node ends a request with an error, and that only one that may not be given to
  # another engine, or was and lost that, too.
  defp wrong?(:mailbox, _what), do: true
  defp wrong?(:impatient, what), do: what not in [:right, :timeout, :node_down]
  defp wrong?(_kind, what), do: what not in [:right, :left, :node_down]

  # What is left of requests on a node when all have ended.
  defp left(peer) do
    empty = fn -> Peers.call(peer, __MODULE__, :under_way, []) == [] end

    if eventually(empty, @patience),
      do: [],
      else: [{:left, peer.node, Peers.call(peer, __MODULE__, :under_way, [])}]
  end

  @doc "Couriers and proxies of this node, and the requests of its engine."
  def under_way do
    requests =
      with {:ok, table, _pid} <-
             VLLM.Engine.Table.lookup(%VLLM.LLM{id: @name, model: "", node: node()}),
           %{in_flight: count} when count > 0 <- VLLM.Cluster.Beacon.report(table),
           do: [{:requests, count}],
           else: (_none -> [])

    given =
      with %{table: table} <- VLLM.Cluster.Members.find(@name) do
        for member <- :ets.tab2list(table),
            (size = :ets.info(elem(member, 5), :size)) > 0,
            do: {:given, size}
      else
        nil -> []
      end

    Peers.carriers() ++ requests ++ given
  end

  @doc "The account as text."
  def describe(account) do
    rows =
      for {{kind, what}, count} <- Enum.sort(account.ends),
          do: "#{String.pad_trailing("#{kind}: #{inspect(what)}", 30)} #{count}\n"

    faults = for {fault, count} <- Enum.sort(account.faults), do: "#{fault} #{count}  "

    [
      "requests #{Enum.sum(Map.values(account.ends))}\n",
      rows,
      "latest end after a deadline #{account.latest} ms\n"
    ] ++
      ["faults: ", faults, "\nviolations #{length(account.violations)}\n"] ++
      Enum.map(account.violations, &"  #{inspect(&1)}\n")
  end
end
