defmodule VLLM.RemoteTest do
  # Calls to engines of another node. Two nodes: `e` has the engines, `c` calls them.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{Error, FakeEngine, LLM, Peers}

  setup_all do
    [e, c] = Peers.start([:engine, :caller])
    script = %{"a" => "A", "b" => "B", "deltas" => {:deltas, List.duplicate("x", 1000)}}
    Peers.serve_both(e, script)
    %{e: e, c: c, far: {Far, e.node}, scripted: {Scripted, e.node}}
  end

  setup %{e: e} do
    on_exit(fn ->
      assert eventually(fn -> Peers.call(e, FakeEngine, :in_flight, [Far]) == 0 end)
    end)
  end

  describe "each function answers as at home:" do
    @message [%{role: "user", content: "a"}]

    for {function, args} <- [
          await_ready: [],
          engine_info: [],
          replicas: [],
          generate: [["a", "b"]],
          generate: ["a", [no_such_option: 1]],
          generate: ["unscripted"],
          generate: [""],
          chat: [@message],
          beam_search: ["a", [beam_width: 2, max_tokens: 2]],
          apply_chat_template: [@message],
          tokenize: [["a", "bc"]],
          detokenize: [[97, 98]],
          embed: ["a"],
          classify: ["a"],
          encode: ["a"],
          score: ["a", "b"],
          rerank: ["a", ["b", "a"]],
          health: [],
          metrics: [],
          reset_prefix_cache: [],
          reset_mm_cache: [],
          reset_encoder_cache: [],
          sleep: [],
          wake_up: [],
          list_loras: [],
          load_lora: [%VLLM.LoRARequest{lora_name: "l", lora_int_id: 1, lora_path: "/l"}],
          unload_lora: ["nobody"],
          scale: [2],
          scale: [1],
          scale: [0],
          drain: [7],
          reload: [[max_queue: 3]],
          reload: [[no: 1], [timeout: "x"]],
          restart: [1]
        ] do
      test "#{function}(#{inspect(args)})", %{e: e, c: c, scripted: scripted} do
        function = unquote(function)
        args = unquote(Macro.escape(args))
        at_home = Peers.call(e, VLLM, function, [Scripted | args])
        assert plain(Peers.call(c, VLLM, function, [scripted | args])) == plain(at_home)
      end
    end

    test "the streams", %{e: e, c: c, scripted: scripted} do
      # Made here, enumerated there.
      streams = fn engine ->
        [
          VLLM.stream(engine, "a"),
          VLLM.stream(engine, "deltas"),
          VLLM.stream(engine, "unscripted"),
          VLLM.stream(engine, ["a", "b"]),
          VLLM.stream_text!(engine, "b"),
          VLLM.chat_stream(engine, @message),
          VLLM.generate_stream(engine, ["a", "b", "", "unscripted", "a"]),
          VLLM.generate_stream(engine, [])
        ]
      end

      for {home, far} <-
            Enum.zip(streams.(%LLM{id: Scripted, model: "", node: e.node}), streams.(scripted)) do
        home = Peers.call(e, Enum, :to_list, [home])
        far = Peers.call(c, Enum, :to_list, [far])
        assert Enum.sort(plain(far)) == Enum.sort(plain(home))
      end
    end

    # Without what counts or measures.
    defp plain(%Error{} = error), do: Map.from_struct(error)
    defp plain(%VLLM.EngineInfo{} = info), do: %{info | load_seconds: 0}
    defp plain(%{request_id: _} = output), do: %{output | request_id: nil}
    defp plain(list) when is_list(list), do: Enum.map(list, &plain/1)
    defp plain({tag, value}), do: {tag, plain(value)}
    defp plain(other), do: other
  end

  describe "an engine is found" do
    test "by every name that it can have", %{e: e, c: c} do
      true = Peers.call(c, Node, :connect, [e.node])
      names = [{:global, FarGlobal}, {:via, :global, FarVia}]
      for name <- names, do: Peers.serve(e, VLLM.Test, name: name, script: "here")
      [one, other] = for _ <- 1..2, do: Peers.serve(e, VLLM.Test, model: "m", script: "here")

      for name <- [FarGlobal, FarVia],
          do:
            assert(
              eventually(fn -> Peers.call(c, :global, :whereis_name, [name]) != :undefined end)
            )

      for engine <- [one, %LLM{id: other, model: "m", node: e.node} | names] do
        assert {:ok, [output]} = Peers.call(c, VLLM, :generate, [engine, "x"])
        assert VLLM.text(output) == "here"
        assert :ok = Peers.call(c, VLLM, :stop, [engine])
        assert :ok = Peers.call(c, VLLM, :stop, [engine])

        assert {:error, %Error{reason: :not_running}} =
                 Peers.call(c, VLLM, :generate, [engine, "x"])
      end
    end

    test "for as long as can be told", %{e: e, c: c} do
      options = [timeout: 2 ** 32 - 1, queue_timeout: 2 ** 32 - 1]
      assert {:ok, _output} = ask(c, {Scripted, e.node}, "a", options)
      info = [{Scripted, e.node}, 2 ** 32 - 1]
      assert {:ok, %{model: _}} = Peers.call(c, VLLM, :engine_info, info)
    end

    test "by a lazy stream wherever it is enumerated", %{e: e, c: c} do
      via = {:via, :global, FarLazy}
      Peers.serve(e, VLLM.Test, name: via, script: %{"a" => "A"})
      true = Peers.call(c, Node, :connect, [e.node])
      whereis = fn -> Peers.call(c, :global, :whereis_name, [FarLazy]) end
      assert eventually(fn -> whereis.() != :undefined end)
      # As one is that was made on the caller's node, when the engine still was there.
      handle = %LLM{id: via, model: "", node: c.node}

      for function <- [:stream, :chat_stream, :generate_stream],
          {engine, made, enumerated} <- [{Scripted, e, c}, {via, c, e}, {handle, c, e}] do
        prompt = if function == :chat_stream, do: @message, else: "a"
        prompt = if function == :generate_stream, do: [prompt], else: prompt
        stream = Peers.call(made, VLLM, function, [engine, prompt])
        assert [one] = Peers.call(enumerated, Enum, :to_list, [stream])
        refute match?({:error, _}, one)
        refute match?({_index, {:error, _}}, one)
      end
    end

    test "not on a node that has none, and each says why", %{e: e, c: c} do
      assert {:error, %Error{reason: :not_running}} = ask(c, {Nobody, e.node}, "x")
      nowhere = :"nobody@127.0.0.1"
      assert {:error, %Error{reason: :node_down} = error} = ask(c, {Far, nowhere}, "x")
      assert error.message =~ "`Node.ping(:\"nobody@127.0.0.1\")`"
      assert error.details == %{"node" => "nobody@127.0.0.1"}

      assert [{0, {:error, %Error{reason: :node_down}}}, {1, {:error, %Error{}}}] =
               Peers.call(c, Enum, :to_list, [VLLM.generate_stream({Far, nowhere}, ["a", "b"])])

      assert {:error, %Error{reason: :node_down} = error} = VLLM.generate({Far, nowhere}, "x")
      assert error.message =~ "`--name`"
    end

    @tag :tmp_dir
    test "by a version of this library that understands it", %{e: e, c: c, tmp_dir: dir} do
      code = """
      inbox = make_ref()
      ref = :erlang.alias()
      hello = %{protocol: 99, version: "9.9.9", address: {inbox, ref}}
      Node.spawn(node, VLLM.Remote.Proxy, :serve, [hello])
      receive do
        {^inbox, ^ref, message} ->
          VLLM.Remote.Call.last(%{node: node}, {ref, message})
      end
      """

      assert {:error, %Error{reason: :node_incompatible} = error} =
               Peers.eval(c, code, node: e.node)

      assert error.message =~ "which do not understand each other (protocol 2 there, 2 here)"

      # A node that has nothing of it, which logs that, and nothing of what it was asked.
      [bare] = Peers.start([:bare], beside: e, bare: true)
      log = %{level: :error, config: %{file: to_charlist(Path.join(dir, "log"))}}
      :ok = Peers.call(bare, :logger, :add_handler, [:file, :logger_std_h, log])
      :ok = Peers.call(bare, :logger, :set_primary_config, [:level, :error])

      assert {:error, %Error{reason: :node_incompatible} = error} =
               ask(c, {Far, bare.node}, "secret")

      assert error.message =~ "has not this library"
      logged = fn -> File.read!(log.config.file) end
      assert eventually(fn -> logged.() =~ "undef" end)
      refute logged.() =~ "secret"
    end

    test "not on a node where the library's application has not started", %{e: e, c: c} do
      [idle] = Peers.start([:idle], beside: e)
      :ok = Peers.call(idle, Application, :stop, [:ex_vllm])
      assert {:error, %Error{reason: :not_running} = error} = ask(c, {Far, idle.node}, "x")
      assert error.message =~ "`:ex_vllm` does not run on the node #{idle.node}"

      assert [{0, {:error, %Error{reason: :not_running}}}] =
               Peers.call(c, Enum, :to_list, [VLLM.generate_stream({Far, idle.node}, ["a"])])

      # There itself, by whatever name, and for all that needs it.
      for engine <- [Far, {:global, Far}, %VLLM.LLM{id: Far, model: "m", node: idle.node}],
          {name, args} <- [generate: ["x"], replicas: [], embed: ["x"]] do
        assert {:error, %Error{reason: :not_running, message: message}} =
                 Peers.call(idle, VLLM, name, [engine | args])

        assert message =~ "Application.ensure_all_started(:ex_vllm)"
      end

      assert Peers.call(idle, VLLM, :stop, [Far]) == :ok
      assert {:error, %Error{reason: :not_running}} = Peers.call(idle, VLLM, :llm, ["/no/model"])
      assert {:error, %Error{}} = Peers.call(idle, VLLM.Models, :delete, ["nothing"])

      assert {:failed_to_start_child, _id, %Error{reason: :not_running}} =
               Peers.eval(idle, """
               Process.flag(:trap_exit, true)
               child = {VLLM, name: Far, model: "/no/model"}
               {:error, {:shutdown, reason}} = Supervisor.start_link([child], strategy: :one_for_one)
               reason
               """)

      assert [{:error, %Error{reason: :not_running}}, :ok] =
               Peers.eval(idle, """
               ref = VLLM.stream_to(Far, "x", self())
               [receive(do: ({:vllm, ^ref, message} -> message)), VLLM.cancel(ref)]
               """)
    end
  end

  describe "a call ends" do
    for {name, {prompt, options}} <- VLLM.Ends.all() do
      # After a death the worker takes a while to begin anew.
      if name not in [:result, :error, :deadline, :late, :not_sendable, :unknown_option],
        do: @tag(:slow)

      test "as it does at home: #{name}", %{e: e, c: c, far: far} do
        [prompt, options] = [unquote(prompt), unquote(Macro.escape(options))]
        at_home = ask(e, Far, prompt, options)
        assert ended(ask(c, far, prompt, options)) == ended(at_home)
        # What was done is over, and both serve on.
        assert {:ok, "again"} = ask(c, far, "reply:again", retry: true)
      end

      for {begun, first} <- [{"", ""}, {" that has begun", "delta:a;"}] do
        unless {name, begun} == {:deadline, ""}, do: @tag(:slow)
        # Time enough for the first delta, also on a busy machine.
        begins? = first != "" and Keyword.has_key?(options, :timeout)
        options = if begins?, do: [timeout: 2_000], else: options

        test "as a stream#{begun} does at home: #{name}", %{e: e, c: c, far: far} do
          prompt = unquote(first <> prompt)
          stream = &VLLM.stream(&1, prompt, unquote(Macro.escape(options)))
          home = Peers.call(e, Enum, :to_list, [stream.(%LLM{id: Far, model: "", node: e.node})])
          away = Peers.call(c, Enum, :to_list, [stream.(far)])
          assert Enum.map(away, &ended/1) == Enum.map(home, &ended/1)
        end
      end
    end

    defp ended({:error, error}), do: {:error, error.reason}
    defp ended(other), do: other

    test "with its caller, which is killed", %{e: e, c: c, far: far} do
      for code <- [
            "VLLM.generate(far, ~s(hold))",
            "VLLM.generate(far, [~s(hold), ~s(reply:x)])",
            "Enum.to_list(VLLM.stream(far, ~s(delta:a;hold)))",
            "Enum.to_list(VLLM.generate_stream(far, [~s(hold)]))"
          ] do
        caller = Peers.eval(c, "spawn(fn -> #{code} end)", far: far)
        await_held(e, far, 1)
        Peers.call(c, Process, :exit, [caller, :kill])
        await_free(e)
      end
    end

    test "when its reader leaves, and nothing is left with it", %{e: e, c: c, far: far} do
      code = """
      [{:ok, _}] = Enum.take(VLLM.stream(far, "delta:a;delta:b;hold"), 1)
      [_one] = Enum.take(VLLM.generate_stream(far, ["reply:a", "hold", "hold"]), 1)
      {:error, %{reason: :timeout}} = VLLM.generate(far, ["reply:a", "hold"], timeout: 50)
      ref = VLLM.stream_to(far, "delta:a;hold")
      receive do: ({:vllm, ^ref, %{text: "a"}} -> VLLM.cancel(ref))
      Process.info(self(), [:messages, :monitors, :links])
      """

      assert [messages: [], monitors: [], links: []] = Peers.eval(c, code, far: far)
      await_free(e)
      await_no_proxies(e)
      await_no_proxies(c)
    end

    test "and is counted as at home when its reader leaves", %{e: e, c: c, far: far} do
      code = """
      [{:ok, _}] = Enum.take(VLLM.stream(engine, "delta:a;hold"), 1)
      [_one] = Enum.take(VLLM.generate_stream(engine, ["reply:a", "hold", "hold"]), 1)
      late = VLLM.stream(engine, "delta:a;hold", timeout: 1_000)
      [{:ok, _}, {:error, %{reason: :timeout}}] = Enum.to_list(late)
      stalled = VLLM.stream(engine, "delta:a;hold", inter_token_timeout: 50)
      [{:ok, _}, {:error, %{reason: :timeout}}] = Enum.to_list(stalled)

      # By processes that end then.
      Task.await(Task.async(fn -> Enum.take(VLLM.stream(engine, "delta:a;hold"), 1) end))
      ref = VLLM.stream_to(engine, "delta:a;hold", self(), timeout: 300)
      receive do: ({:vllm, ^ref, {:error, %{reason: :timeout}}} -> :ok)

      prompts = Stream.map(1..9, fn n -> if n == 3, do: throw(:leaves), else: "hold" end)
      try do
        Enum.to_list(VLLM.generate_stream(engine, prompts))
      catch
        :leaves -> :ok
      end
      """

      counts = fn ->
        code = "VLLM.Engine.Table.lookup(Far) |> elem(1) |> VLLM.Engine.Table.counts(:requests)"
        counts = Peers.eval(e, code)
        for outcome <- [:ok, :aborted, :timeout], do: Map.get(counts, {"generate", outcome}, 0)
      end

      before = counts.()
      Peers.eval(e, code, engine: Far)
      assert added(before, counts.()) == [1, 6, 3]
      before = counts.()
      Peers.eval(c, code, engine: far)
      assert eventually(fn -> added(before, counts.()) == [1, 6, 3] end)
    end

    defp added(before, later), do: Enum.zip_with(later, before, &(&1 - &2))

    test "and nothing of it is left with whoever did not leave it", %{c: c, far: far} do
      code = """
      ask = fn steps ->
        body = ~s({"model": "m", "prompt": "\#{steps}"})
        params = %{"method" => "POST", "path" => "/v1/completions", "model" => "m", "body" => body}
        VLLM.Exchange.request(far, params, VLLM.Engine.Call.new(%{timeout: 60_000}))
      end

      for _ <- 1..20 do
        {:ok, {200, _, "yes"}} = ask.("answer:200:yes")
        {:ok, {200, _, body}} = ask.("head:200;chunk:one;end")
        [{:ok, "one"}] = Enum.to_list(body)
        {:error, %{reason: :internal}} = ask.("error:internal")
        # Zip suspends it after each element.
        [_, _] = far |> VLLM.stream("delta:a;delta:b;reply:ab") |> Stream.zip(1..9) |> Enum.to_list()
        [_] = far |> VLLM.generate_stream(["reply:a"]) |> Stream.zip(1..9) |> Enum.to_list()
      end

      Process.info(self(), :messages)
      """

      assert {:messages, []} = Peers.eval(c, code, far: far)
    end

    test "with the node of either side", %{e: e, c: c, far: far} do
      [victim] = Peers.start([:victim], beside: e)
      script = %{"hold" => :hang, "begun" => {:deltas, ["a", :hang]}}
      Peers.serve(victim, VLLM.Test, name: Victim, script: script)
      there = {Victim, victim.node}

      # Its own calls, which are freed.
      Peers.eval(victim, "spawn(fn -> VLLM.generate(far, ~s(hold)) end)", far: far)
      Peers.eval(victim, "spawn(fn -> Enum.to_list(VLLM.stream(far, ~s(hold))) end)", far: far)
      await_held(e, far, 2)

      # Calls to it, which are told.
      calls = [
        in_background(c, VLLM, :generate, [there, "hold"]),
        in_background(c, VLLM, :generate, [there, "hold", [retry: true]]),
        in_background(c, Enum, :to_list, [VLLM.stream(there, "begun", retry: true)]),
        in_background(c, Enum, :to_list, [VLLM.generate_stream(there, ["hold", "hold"])])
      ]

      assert eventually(fn -> Peers.call(victim, FakeEngine, :in_flight, [Victim]) == 5 end)
      Peers.kill(victim)

      for call <- calls, answer = Task.await(call, 30_000) do
        assert %Error{reason: :node_down} = error = error_of(answer)
        assert error.details == %{"node" => Atom.to_string(victim.node)}
      end

      await_free(e)
    end

    test "at a cut link, and runs once more where it may", %{e: e, c: c, far: far} do
      once = in_background(c, VLLM, :generate, [far, "hold"])
      again = in_background(c, VLLM, :generate, [far, "hold", [retry: true]])
      stream = in_background(c, Enum, :to_list, [VLLM.stream(far, "hold", retry: true)])
      begun = in_background(c, Enum, :to_list, [VLLM.stream(far, "delta:a;hold", retry: true)])
      many = ["reply:a", "hold", "error:internal", "hold"]
      many = in_background(c, Enum, :to_list, [VLLM.generate_stream(far, many, retry: true)])
      await_held(e, far, 6)
      Peers.call(c, Node, :disconnect, [e.node])

      assert %Error{reason: :node_down} = error_of(Task.await(once))
      assert [{:ok, %{text: "a"}}, {:error, %Error{reason: :node_down}}] = Task.await(begun)
      await_held(e, far, 4)
      assert {:ok, "released"} = ask(e, Far, "release")
      assert {:ok, [output]} = Task.await(again)
      assert VLLM.text(output) == "released"
      assert [] = Task.await(stream)

      texts =
        for {index, result} <- Enum.sort(Task.await(many)) do
          case result do
            {:ok, output} -> {index, VLLM.text(output)}
            {:error, error} -> {index, error.reason}
          end
        end

      assert texts == [{0, "a"}, {1, "released"}, {2, :internal}, {3, "released"}]
    end

    test "at its deadline where the other node hangs", %{e: e, c: c, far: far} do
      assert {:ok, "x"} = ask(c, far, "reply:x")
      Peers.pause(e)

      code = """
      calls = fn ->
        for call <- [
              fn -> VLLM.generate(far, "reply:x", timeout: 100) end,
              fn -> Enum.to_list(VLLM.stream(far, "reply:x", timeout: 300)) end,
              fn -> Enum.to_list(VLLM.generate_stream(far, ["reply:x"], timeout: 300)) end
            ],
            do: Task.async(call)
      end

      first = Task.await_many(calls.(), 30_000)
      # More than the distribution takes: from then on it holds senders back.
      spawn(fn -> send({:nobody, node}, String.duplicate("x", 30_000_000)) end)
      full = fn full -> :erlang.send({:nobody, node}, :x, [:nosuspend]) == :nosuspend or full.(full) end
      true = full.(full)
      first ++ Task.await_many(calls.(), 30_000)
      """

      answers = Peers.eval(c, code, far: far, node: e.node)
      assert for(answer <- answers, do: error_of(answer).reason) == List.duplicate(:timeout, 6)
      # Also those that the distribution holds.
      await_no_proxies(c)
      Peers.resume(e)
      assert {:ok, "again"} = ask(c, far, "reply:again")
      await_no_proxies(e)
    end

    # It takes the nodes a while to find together again.
    @tag :slow
    test "at its deadline where a node hangs that must be connected to first",
         %{e: e, c: c, far: far} do
      assert {:ok, "x"} = ask(c, far, "reply:x")
      Peers.pause(e)
      true = Peers.call(c, Node, :disconnect, [e.node])

      assert {:error, %Error{reason: :timeout}} = ask(c, far, "reply:x", timeout: 100)
      stream = VLLM.stream(far, "reply:x", timeout: 100)
      assert [{:error, %Error{reason: :timeout}}] = Peers.call(c, Enum, :to_list, [stream])

      Peers.resume(e)
      assert {:ok, "again"} = ask(c, far, "reply:again", retry: true)
      await_no_proxies(c)
      await_no_proxies(e)
    end

    test "where the engine is full, drains or stops", %{e: e, c: c} do
      Peers.serve(e,
        name: Small,
        model: "ready",
        max_in_flight: 1,
        max_queue: 0,
        shutdown_timeout: 50
      )

      small = {Small, e.node}
      holder = in_background(c, VLLM, :generate, [small, "hold"])
      assert eventually(fn -> Peers.call(e, FakeEngine, :in_flight, [Small]) == 1 end)
      assert {:error, %Error{reason: :overloaded} = error} = ask(c, small, "reply:x")
      assert error.details["retry_after_ms"] > 0
      assert :ok = Peers.call(c, VLLM, :drain, [small, 1, [timeout: 50]])
      assert %Error{reason: :shutdown} = error_of(Task.await(holder))
      assert {:error, %Error{reason: :not_running}} = ask(c, small, "reply:x", timeout: 300)
      assert :ok = Peers.call(c, VLLM, :restart, [small])
      waiting = in_background(c, VLLM, :generate, [small, "hold"])
      assert eventually(fn -> Peers.call(e, FakeEngine, :in_flight, [Small]) == 1 end)
      assert :ok = Peers.call(c, VLLM, :stop, [small])
      assert %Error{reason: :shutdown} = error_of(Task.await(waiting))
    end
  end

  describe "a stream" do
    test "has its deltas in their order, however they travel", %{e: e, c: c, far: far} do
      prompt = "packed:ab,c;delta:d;packed:e;delta:f;packed:,g,h;reply:abcdefgh"

      home =
        Peers.call(e, Enum, :to_list, [
          VLLM.stream(%LLM{id: Far, model: "", node: e.node}, prompt)
        ])

      away = Peers.call(c, Enum, :to_list, [VLLM.stream(far, prompt)])
      assert for({:ok, delta} <- away, do: delta.text) == ["ab", "c", "d", "e", "f", "", "g", "h"]
      assert away == home
    end

    test "runs again until its first delta has gone, and not after it", %{c: c, far: far} do
      for {steps, expected} <- [{"", ["a", "b"]}, {"packed:x;", ["x", :engine_dead]}] do
        flag = Path.join(System.tmp_dir!(), "far-#{System.unique_integer([:positive])}")
        on_exit(fn -> File.rm(flag) end)
        prompt = steps <> "once:#{flag}:kill;packed:a,b;reply:ab"
        stream = VLLM.stream(far, prompt, retry: true)
        assert Enum.map(Peers.call(c, Enum, :to_list, [stream]), &told/1) == expected
      end
    end

    defp told({:ok, delta}), do: delta.text
    defp told({:error, error}), do: error.reason

    test "is told that its engine stops also where that ends with the library", %{e: e, c: c} do
      [stopping] = Peers.start([:stopping], beside: e)
      script = %{"begun" => {:deltas, ["a", :hang]}}
      Peers.serve(stopping, VLLM.Test, name: Stopping, script: script, shutdown_timeout: 0)
      there = {Stopping, stopping.node}

      streams =
        for _ <- 1..20, do: in_background(c, Enum, :to_list, [VLLM.stream(there, "begun")])

      assert eventually(fn -> Peers.call(stopping, FakeEngine, :in_flight, [Stopping]) == 20 end)
      assert :ok = Peers.call(stopping, :application, :stop, [:ex_vllm])
      for stream <- streams, do: assert(told(List.last(Task.await(stream))) == :shutdown)
    end

    test "has no more deltas on the way than its reader has granted", %{c: c, scripted: scripted} do
      code = """
      ref = make_ref()
      {:suspended, _, next} =
        Enumerable.reduce(VLLM.stream(scripted, "deltas"), {:cont, 0}, fn _, n -> {:suspend, n + 1} end)
      queue = fn -> self() |> Process.info(:message_queue_len) |> elem(1) end
      wait = fn wait, n ->
        if queue.() < 127 and n > 0 do
          Process.sleep(5)
          wait.(wait, n - 1)
        end
      end

      wait.(wait, 4000)
      # No more come.
      Process.sleep(50)
      on_the_way = queue.()
      next.({:halt, 0})
      {on_the_way, Process.info(self(), :message_queue_len)}
      """

      assert {127, {:message_queue_len, 0}} = Peers.eval(c, code, scripted: scripted)
    end

    test "of many prompts takes no more of them than at home", %{e: e, c: c} do
      Peers.serve(e, VLLM.Test, name: Narrow, script: "x", max_in_flight: 2)

      code = """
      taken = :counters.new(1, [])
      prompts = Stream.repeatedly(fn -> :counters.add(taken, 1, 1); "x" end)
      indexes = for {index, {:ok, _}} <- Enum.take(VLLM.generate_stream(narrow, prompts), 5), do: index
      {Enum.sort(indexes), :counters.get(taken, 1)}
      """

      assert {[0, 1, 2, 3, 4], home} = Peers.eval(e, code, narrow: Narrow)
      assert {[0, 1, 2, 3, 4], ^home} = Peers.eval(c, code, narrow: {Narrow, e.node})
      assert home <= 8
    end

    test "to a process of another node waits until that reads", %{e: e, c: c} do
      receiver = Peers.eval(c, "spawn(fn -> Process.sleep(:infinity) end)")
      queue = fn -> Peers.call(c, Process, :info, [receiver, :message_queue_len]) |> elem(1) end
      ref = Peers.call(e, VLLM, :stream_to, [Scripted, "deltas", receiver])
      assert eventually(fn -> queue.() >= 64 end)
      # It was looked at again in vain.
      Process.sleep(100)
      assert queue.() <= 128

      # Another process cancels it, from yet another node than forwards it.
      assert :ok = Peers.call(c, VLLM, :cancel, [ref])
      {:messages, messages} = Peers.call(c, Process, :info, [receiver, :messages])
      assert {:vllm, ^ref, {:error, %Error{reason: :aborted}}} = List.last(messages)
    end

    # It takes `cancel/1` its 5 s.
    @tag :slow
    test "to a process that was cancelled while its node hung ends when that goes on",
         %{e: e, c: c} do
      receiver = Peers.eval(c, "spawn(fn -> Process.sleep(:infinity) end)")
      ref = Peers.call(e, VLLM, :stream_to, [Far, "delta:a;hold", receiver])
      messages = fn -> Peers.call(c, Process, :info, [receiver, :messages]) |> elem(1) end
      assert eventually(fn -> match?([{:vllm, ^ref, %{text: "a"}}], messages.()) end)
      Peers.pause(e)
      assert :ok = Peers.call(c, VLLM, :cancel, [ref])
      assert [_delta] = messages.()
      Peers.resume(e)
      aborted = &match?({:vllm, ^ref, {:error, %Error{reason: :aborted}}}, &1)
      assert eventually(fn -> aborted.(List.last(messages.())) end)
      await_free(e)
      await_no_proxies(c)
    end

    test "to a process of a node without this library comes as it is", %{e: e} do
      [bare] = Peers.start([:receiver], beside: e, bare: true)
      receiver = Peers.call(bare, :erlang, :spawn, [:timer, :sleep, [:infinity]])
      info = &elem(Peers.call(bare, :erlang, :process_info, [receiver, &1]), 1)
      ref = Peers.call(e, VLLM, :stream_to, [Scripted, "deltas", receiver])
      assert eventually(fn -> match?({:vllm, ^ref, {_end, _}}, List.last(info.(:messages))) end)
      assert {:vllm, ^ref, {:done, %VLLM.RequestOutput{}}} = List.last(info.(:messages))
      assert info.(:message_queue_len) == 1001
    end

    test "to a process of another node comes to its end", %{e: e, c: c} do
      code = """
      test = self()
      receiver = spawn(fn ->
        read = fn read, n -> receive do
          {:vllm, _, %{text: _}} -> read.(read, n + 1)
          {:vllm, _, last} -> send(test, {n, elem(last, 0)})
        end end
        read.(read, 0)
      end)
      :erpc.call(node, VLLM, :stream_to, [Scripted, "deltas", receiver])
      receive do: (result -> result)
      """

      assert {1000, :done} = Peers.eval(c, code, node: e.node)
    end
  end

  defp ask(peer, engine, prompt, options \\ []),
    do: Peers.call(peer, FakeEngine, :ask, [engine, prompt, options])

  defp in_background(peer, module, function, args),
    do: Task.async(fn -> Peers.call(peer, module, function, args) end)

  defp await_held(peer, {name, _node}, count),
    do: Peers.call(peer, FakeEngine, :await_held, [name, count])

  defp await_free(e) do
    assert eventually(fn -> ask(e, Far, "held") == {:ok, "0"} end)
    assert eventually(fn -> Peers.call(e, FakeEngine, :in_flight, [Far]) == 0 end)
  end

  defp await_no_proxies(peer), do: assert(eventually(fn -> Peers.carriers(peer) == [] end))

  defp error_of({:error, error}), do: error
  defp error_of(list) when is_list(list), do: list |> List.last() |> error_of()
  defp error_of({index, result}) when is_integer(index), do: error_of(result)
end
