# Engines that are called over links that are late, lossy, slow and cut, between BEAMs in network namespaces
# (test/support/switch.py): whether every end of a call at home has its like, and how long it takes. As root, some
# minutes; ends with status 1 where something is not as it is to be.
#
#     MIX_ENV=test mix run bench/namespaces.exs
#
# The switch is a program because netem is not in every kernel ("Specified qdisc kind is unknown").

Logger.configure(level: :error)

{:module, side, code, _} =
  defmodule Bench.Namespaces.Side do
    # What the caller's node is told to do; its code is sent there.

    @minute [timeout: 60_000]

    # Whether each caller got its own answers.
    def ask_all(engine) do
      1..10
      |> Enum.map(fn caller ->
        Task.async(fn -> for n <- 1..20, do: own?(engine, caller * n) end)
      end)
      |> Task.await_many(:infinity)
      |> Enum.concat()
      |> Enum.count(& &1)
    end

    defp own?(engine, n) do
      prompt = "#{rem(n, 50) + 1}"
      {:ok, [output]} = VLLM.generate(engine, prompt, @minute)
      VLLM.text(output) == prompt
    end

    def read(engine, prompt), do: Enum.join(VLLM.stream_text!(engine, prompt, @minute))

    # How a call or a stream ends.
    def last(:call, engine, prompt, options), do: reason(VLLM.generate(engine, prompt, options))

    def last(:stream, engine, prompt, options),
      do: engine |> VLLM.stream(prompt, options) |> Enum.to_list() |> List.last() |> reason()

    defp reason({:ok, _}), do: :ok
    defp reason({:error, error}), do: error.reason

    def leave(engine), do: Enum.take(VLLM.stream(engine, "begun", @minute), 1)

    def die(engine) do
      caller = spawn(fn -> VLLM.generate(engine, "hang", @minute) end)
      Process.sleep(1_000)
      Process.exit(caller, :kill)
    end
  end

defmodule Bench.Namespaces do
  import VLLM.OSProcess, only: [eventually: 2]

  alias VLLM.{Ends, FakeEngine, LLM, Network, Peers}

  @links [
    {"as it is", []},
    {"100 ms late", [delay: 0.1]},
    {"5 % lost", [loss: 0.05]},
    {"1 Mbit/s", [rate: 125_000]}
  ]

  # What is under way when the link is cut, and the reasons that it may end with.
  @under_way [
    {"a call", :call, "hang", [timeout: :infinity], [:node_down]},
    {"a call with 2 s", :call, "hang", [timeout: 2_000], [:timeout]},
    {"a call with 20 s and `retry: true`", :call, "hang", [timeout: 20_000, retry: true],
     [:timeout, :node_down]},
    {"a stream that has begun", :stream, "begun", [timeout: :infinity], [:node_down]},
    {"a stream that has begun, with 2 s", :stream, "begun", [timeout: 2_000], [:timeout]},
    {"a stream that waits 1 s for each delta", :stream, "begun",
     [timeout: :infinity, inter_token_timeout: 1_000], [:timeout]}
  ]
  @begins_then {"a call that begins then, with 1 s", :call, "1", [timeout: 1_000],
                [:timeout, :node_down]}

  # In seconds: after at most a quarter more, what says nothing is given up.
  @ticktime 8

  @patience 60_000

  def run(side, code) do
    network = Network.start_link(2)
    peers = Peers.launch([:engine, :caller], network: network, kernel: [net_ticktime: @ticktime])
    [e, c] = peers
    for peer <- peers, do: Peers.call(peer, :logger, :set_primary_config, [:level, :none])
    {:module, _} = Peers.call(c, :code, :load_binary, [side, 'namespaces', code])
    Peers.serve_both(e, script())
    context = %{side: side, network: network, e: e, c: c}
    IO.puts("link; ends alike; right answers; 1,000 deltas; latest end; freed when left; killed")

    held =
      for {name, link} <- @links, {what, false} <- over(context, name, link), do: {name, what}

    cut = for {what, false} <- cut(context), do: {:cut, what}
    for peer <- peers, do: Peers.kill(peer)
    violations = held ++ cut
    for one <- violations, do: IO.puts("VIOLATION #{inspect(one)}")
    if violations != [], do: System.halt(1)
  end

  defp script do
    own = for n <- 1..50, into: %{}, do: {"#{n}", "#{n}"}

    Map.merge(own, %{
      "hang" => :hang,
      "begun" => {:deltas, ["a", :hang]},
      "deltas" => {:deltas, words(1000)},
      "slowly" => {:deltas, for(word <- words(300), do: {:delay, 20, word})},
      long() => "long"
    })
  end

  defp words(count), do: for(n <- 1..count, do: "#{n} ")
  defp long, do: String.duplicate("x", 500_000)

  ## Links that are bad and hold

  # What is as it is to be, and what is not.
  defp over(%{network: network, e: e, c: c} = context, name, link) do
    true = Peers.call(c, Node, :connect, [e.node])
    Network.link(network, 1, link)
    ends = ends()
    {alike, differ} = Enum.split_with(ends, &alike?(context, &1))
    right = there(context, :ask_all, [])
    {took, text} = timed(fn -> there(context, :read, ["deltas"]) end)
    late = Enum.max(for _ <- 1..20, do: late(context, "hang"))
    # More than the slow link carries until then; what is asked after it gets through.
    late = max(late, late(context, long()))
    after_it = there(context, :last, [:call, "7", [timeout: @patience]])
    left = freed(context, :leave)
    killed = freed(context, :die)
    Network.link(network, 1)
    ends = "#{length(alike)} of #{length(ends)}"
    IO.puts("#{name}; #{ends}; #{right}; #{took} ms; #{late} ms; #{left} ms; #{killed} ms")

    [
      {differ, differ == []},
      {:right, right == 200},
      {:whole, text == Enum.join(words(1000))},
      {:late, late < 1000},
      {:after_a_long_prompt, after_it == :ok},
      {:freed, is_integer(left) and is_integer(killed)}
    ]
  end

  # As calls, streams, and streams of which something has come.
  defp ends do
    for form <- [:call, :stream, :begun], {name, {prompt, options}} <- Ends.all() do
      # Enough for what comes before the deadline.
      {form, name, prompt, if(options[:timeout], do: [timeout: 3_000], else: options)}
    end
  end

  defp alike?(%{e: e, c: c}, {form, _name, prompt, options}) do
    here = %LLM{id: Far, model: "", node: e.node}
    far = {Far, e.node}
    alike = ended(e, form, here, prompt, options) == ended(c, form, far, prompt, options)
    {:ok, "again"} = Peers.call(c, FakeEngine, :ask, [far, "reply:again", [retry: true]])
    alike
  end

  defp ended(peer, :call, engine, prompt, options),
    do: plain(Peers.call(peer, FakeEngine, :ask, [engine, prompt, options]))

  defp ended(peer, form, engine, prompt, options) do
    prompt = if form == :begun, do: "delta:a;" <> prompt, else: prompt
    Enum.map(Peers.call(peer, Enum, :to_list, [VLLM.stream(engine, prompt, options)]), &plain/1)
  end

  defp plain({:error, error}), do: error.reason
  defp plain({:ok, %VLLM.Delta{text: text}}), do: text
  defp plain(other), do: other

  defp late(context, prompt) do
    {took, _end} = timed(fn -> there(context, :last, [:call, prompt, [timeout: 500]]) end)
    took - 500
  end

  # In ms, until the engine has nothing of it.
  defp freed(context, function) do
    there(context, function, [])
    {took, free} = timed(fn -> await_in_flight(context, 0) end)
    if free, do: took, else: :never
  end

  defp await_in_flight(%{e: e}, count) do
    here = %LLM{id: Scripted, model: "", node: e.node}
    eventually(fn -> Peers.call(e, FakeEngine, :in_flight, [here]) == count end, @patience)
  end

  # By the caller's node, of the engine of the other one.
  defp there(%{side: side, c: c, e: e}, function, args) do
    engine = {Scripted, e.node}
    args = if function == :last, do: List.insert_at(args, 1, engine), else: [engine | args]
    Peers.call(c, side, function, args)
  end

  defp timed(fun) do
    {microseconds, result} = :timer.tc(fun)
    {div(microseconds, 1000), result}
  end

  ## A link that is cut

  defp cut(%{network: network, e: e, c: c} = context) do
    true = Peers.call(c, Node, :connect, [e.node])
    calls = for one <- @under_way, do: begin(context, one)
    true = await_in_flight(context, length(calls))
    Network.link(network, 2, up: 0)
    calls = [begin(context, @begins_then) | calls]
    ends = Enum.zip([@begins_then | @under_way], Task.await_many(calls, @patience))
    {freed, free} = timed(fn -> await_in_flight(context, 0) end)
    Network.link(network, 2)
    {back, again} = timed(fn -> there(context, :last, [:call, "1", [timeout: 30_000]]) end)

    IO.puts("\ncut (net_ticktime #{@ticktime} s); ended with; after")

    for {{what, _, _, _, _}, {took, reason}} <- ends,
        do: IO.puts("#{what}; #{inspect(reason)}; #{took} ms")

    IO.puts("the engine had nothing of them #{freed} ms after the last had ended")
    IO.puts("with the link whole again an answer came after #{back} ms")
    whole = whole_through_a_cut?(context)

    [{:freed, free}, {:again, again == :ok}, {:whole, whole}] ++
      for {{what, _, _, _, expected}, {_, reason}} <- ends, do: {what, reason in expected}
  end

  defp begin(context, {_what, form, prompt, options, _expected}),
    do: Task.async(fn -> timed(fn -> there(context, :last, [form, prompt, options]) end) end)

  # For less than the distribution takes to notice.
  defp whole_through_a_cut?(%{network: network} = context) do
    stream = Task.async(fn -> there(context, :read, ["slowly"]) end)
    true = await_in_flight(context, 1)
    Network.link(network, 2, up: 0)
    Process.sleep(3_000)
    Network.link(network, 2)
    whole = Task.await(stream, @patience) == Enum.join(words(300))
    IO.puts("a stream of 300 deltas, cut for 3 s: #{if whole, do: "whole", else: "not whole"}")
    whole
  end
end

Bench.Namespaces.run(side, code)
