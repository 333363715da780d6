defmodule VLLM.FaultTest do
  # Every fault that a worker can have, against the real supervision and guard.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.Bridge.Inbox
  alias VLLM.Error
  alias VLLM.Streaming.Reader

  @moduletag :tmp_dir
  @long String.duplicate("x", 1_000)

  describe "loading" do
    test "an engine is ready when its worker says so" do
      llm = start!()
      assert :ok = VLLM.await_ready(llm)
      assert {:ok, "hello"} = ask(llm, "reply:hello")
      assert {:ok, %VLLM.EngineInfo{model: "fake", max_num_seqs: 8}} = VLLM.engine_info(llm)
    end

    test "an engine whose only worker has just died is not ready" do
      llm = start!()
      {:ok, table, _pid} = VLLM.Engine.Table.lookup(llm)
      [worker] = VLLM.Engine.Table.workers(table)
      # What a death does first, before any caller hears of it.
      VLLM.Engine.Table.delete_worker(table, 1)
      assert {:error, %Error{reason: :timeout}} = VLLM.await_ready(llm, 50)
      VLLM.Engine.Table.put_worker(table, 1, worker)
      assert :ok = VLLM.await_ready(llm)
    end

    test "a refusal is not tried again" do
      start_supervised!({VLLM.FakeEngine, name: Refused, model: "refuse:out_of_memory"})
      assert {:error, %Error{reason: :out_of_memory}} = VLLM.await_ready(Refused)
      assert {:error, %Error{reason: :out_of_memory}} = ask(Refused, "reply:x")
      assert [{worker, nil}] = workers(Refused)
      assert {:failed, %{deaths: []}} = :sys.get_state(worker)
    end

    test "a reason that Elixir does not know becomes no atom" do
      assert {:error, %Error{reason: :internal, details: %{"reason" => "made_up_by_a_worker"}}} =
               start("refuse:made_up_by_a_worker")

      assert_raise ArgumentError, fn -> String.to_existing_atom("made_up_by_" <> "a_worker") end
    end

    test "load_timeout ends a stuck load and names the option" do
      assert {:error, %Error{reason: :load_timeout, message: message}} =
               start("hang", load_timeout: 300)

      assert message =~ "load_timeout:"
    end

    test "a worker that dies while loading is restarted", %{tmp_dir: dir} do
      assert {:ok, llm} = start("once:#{dir}/died:exit:3;ready")
      assert {:ok, "hello"} = ask(llm, "reply:hello")
    end

    test "a worker that always dies makes the engine fail with what it last said" do
      assert {:error, %Error{reason: :failed} = error} =
               start("print:no such device;exit:3", max_restarts: 1)

      assert error.message =~ "after 1 restarts"
      assert error.message =~ "ended with status 3"
      assert "no such device" in error.details["log"]
    end

    test "an engine that dies under a worker that loads is a death, and no refusal" do
      assert {:error, %Error{reason: :failed} = error} =
               start("refuse:engine_dead", max_restarts: 1)

      assert error.message =~ "after 1 restarts"
    end

    test "what cannot be sent to the worker ends the start, once" do
      assert {:error, %Error{reason: :invalid_option, message: message}} =
               start("ready", max_frame: 1)

      assert message =~ "`max_frame:`"

      start_supervised!(
        {VLLM.FakeEngine, name: Unsent, model: "ready", max_frame: 1_000, x: @long}
      )

      assert {:error, %Error{reason: :invalid_option}} = VLLM.await_ready(Unsent)
      assert {:error, %Error{reason: :invalid_option}} = ask(Unsent, "reply:x")
      assert [{worker, nil}] = workers(Unsent)
      assert {:failed, %{deaths: []}} = :sys.get_state(worker)

      # Nor does a reload with it end what runs.
      llm = start!()
      assert {:error, %Error{reason: :invalid_option}} = VLLM.reload(llm, max_frame: 1)
      assert {:ok, "here"} = ask(llm, "reply:here")
    end

    test "a start that raises has failed, and tells no more than what it raised" do
      {:ok, config} = VLLM.Engine.Config.new(name: Raising, model: "ready")
      config = %{config | start_program: fn _table -> raise "with a secret" end}
      start_supervised!(%{id: :raising, start: {VLLM.Engine, :start_link, [config]}})
      assert {:error, %Error{reason: :load_failed} = error} = VLLM.await_ready(Raising)
      assert error.message =~ "could not be started (RuntimeError)"
      assert [{worker, nil}] = workers(Raising)
      assert {:failed, %{deaths: []}} = :sys.get_state(worker)
    end

    test "Python that is not there is an error that says so" do
      assert {:error, %Error{reason: :python_not_found, message: message}} =
               VLLM.llm("ready", python: "/nowhere/python")

      assert message =~ "mix vllm."
    end

    test "calls to a starting engine wait until their own deadline" do
      start_supervised!({VLLM.FakeEngine, name: Starting, model: "hang"})

      assert {:error, %Error{reason: :timeout, message: message}} =
               ask(Starting, "reply:x", timeout: 200)

      assert message =~ "starting"
    end

    test "calls to a starting engine are answered once it is ready", %{tmp_dir: dir} do
      start_supervised!({VLLM.FakeEngine, name: Late, model: "once:#{dir}/first:kill;ready"})
      assert {:ok, "hello"} = ask(Late, "reply:hello")
    end
  end

  describe "a worker that dies" do
    for {how, step} <- [
          {"exits", "exit:0"},
          {"is killed", "kill"},
          {"sends garbage", "garbage"},
          {"sends no message", "shapeless"},
          {"breaks off in a frame", "truncated"}
        ] do
      test "and #{how} ends the requests in flight, and comes back" do
        llm = start!()
        ask_in_background(llm, "hold")
        await_held(llm, 1)
        assert {:error, %Error{reason: reason}} = ask(llm, unquote(step))
        assert reason in [:engine_dead, :protocol]
        assert_receive {:answer, {:error, %Error{reason: ^reason}}}
        assert {:ok, "again"} = ask(llm, "reply:again")
      end
    end

    test "takes the last lines of its log into the error" do
      llm = start!()
      assert {:error, %Error{reason: :engine_dead} = error} = ask(llm, "print:out of luck;exit:9")
      assert error.message =~ "status 9"
      assert List.last(error.details["log"]) == "out of luck"
    end

    test "whose engine died under it says so, and what the log says of that" do
      llm = start!()
      ask_in_background(llm, "hold")
      await_held(llm, 1)

      assert {:error, %Error{reason: :engine_dead}} =
               ask(llm, "print:EngineCore: SIGSEGV;exit:70")

      assert_receive {:answer, {:error, %Error{reason: :engine_dead} = error}}
      assert error.message =~ "vLLM's engine ended"
      assert List.last(error.details["log"]) == "EngineCore: SIGSEGV"
    end

    test "is told apart: by a signal or by itself" do
      llm = start!()
      assert {:error, %Error{message: message}} = ask(llm, "kill")
      assert message =~ "signal 9"
    end

    test "leaves no process behind, not even a stubborn one in a session of its own" do
      llm = start!()
      {:ok, child} = ask(llm, "child")
      child = String.to_integer(child)
      assert alive?(child)
      assert {:error, %Error{reason: :engine_dead}} = ask(llm, "kill")
      # The exit status came, so everything is gone already.
      refute alive?(child)
    end

    test "for ever makes the engine fail, which answers with the reason and lives on" do
      llm = start!("ready", max_restarts: 1)
      assert {:error, %Error{reason: :engine_dead}} = ask(llm, "exit:1")
      assert {:ok, "again"} = ask(llm, "reply:again")
      assert {:error, %Error{reason: :engine_dead}} = ask(llm, "exit:1")
      assert {:error, %Error{reason: :failed, message: message}} = ask(llm, "reply:x")
      assert message =~ "gave up after 1 restarts"
    end
  end

  describe "answers" do
    test "to an id that nobody asked for harm nobody" do
      llm = start!()
      assert {:ok, "mine"} = ask(llm, "unknown:mine")
    end

    test "that come twice are delivered once" do
      llm = start!()
      assert {:ok, "first"} = ask(llm, "duplicate:first")
      assert {:ok, "next"} = ask(llm, "reply:next")
      refute_received _
    end

    test "that come after the deadline are dropped" do
      llm = start!()
      assert {:error, %Error{reason: :timeout}} = ask(llm, "late:too late", timeout: 200)
      await_held(llm, 0)
      assert {:ok, "next"} = ask(llm, "reply:next")
      refute_received _
    end

    test "with a body that makes no sense end the run with a reason" do
      llm = start!()
      assert {:error, %Error{reason: :protocol}} = ask(llm, "malformed")
      # The worker hears of it from the caller; a request may be faster.
      assert eventually(fn -> ask(llm, "reply:again") == {:ok, "again"} end)
    end

    test "in bits, which only a stream has, end the run with a reason" do
      llm = start!()
      ask_in_background(llm, "hold")
      await_held(llm, 1)
      assert {:error, %Error{reason: :protocol}} = ask(llm, "packed:x;hold")
      assert {:error, %Error{reason: :protocol, message: message}} = ask(llm, "delta:x;hold")
      assert message =~ "no stream"
      assert_receive {:answer, {:error, %Error{reason: :protocol}}}
      assert {:ok, "again"} = ask(llm, "reply:again")
      refute_received _
    end

    test "longer than a frame may be end the run with a reason" do
      llm = start!("ready", max_frame: 1_000_000)
      assert {:error, %Error{reason: :protocol, message: message}} = ask(llm, "oversized")
      assert message =~ "too long"
      assert {:ok, "again"} = ask(llm, "reply:again")
    end

    test "go to whoever asked, whatever the order" do
      llm = start!()
      test = self()

      for n <- 1..50 do
        spawn(fn ->
          text = if rem(n, 2) == 0, do: "reply:#{n}", else: "duplicate:#{n}"
          send(test, {n, ask(llm, text)})
        end)
      end

      for n <- 1..50 do
        text = Integer.to_string(n)
        assert_receive {^n, {:ok, ^text}}
      end
    end
  end

  describe "requests" do
    test "of a caller that dies are aborted in the worker" do
      llm = start!()
      caller = ask_in_background(llm, "hold")
      await_held(llm, 1)
      Process.exit(caller, :kill)
      await_held(llm, 0)
    end

    test "whose deadline passes are aborted in the worker" do
      llm = start!()
      assert {:error, %Error{reason: :timeout, message: message}} = ask(llm, "hold", timeout: 200)
      assert message =~ "timeout:"
      await_held(llm, 0)
    end

    test "of a list end with the first error, which says whose it is; the others are aborted" do
      llm = start!()
      prompts = ["hold", "reply:x", "error:invalid_prompt"]
      assert {:error, %Error{reason: :invalid_prompt} = error} = VLLM.generate(llm, prompts)
      assert error.details["prompt_index"] == 2
      await_held(llm, 0)
    end

    test "of a list are answered in order, more than fit into the worker at once" do
      llm = start!("ready", max_in_flight: 4, max_queue: 0)
      outputs = VLLM.generate!(llm, for(n <- 1..100, do: "reply:#{n}"))
      assert VLLM.text(outputs) == for(n <- 1..100, do: "#{n}")
    end

    test "beyond max_in_flight and max_queue are refused at once" do
      llm = start!("ready", max_in_flight: 2, max_queue: 1)
      for _ <- 1..3, do: ask_in_background(llm, "hold")
      assert eventually(fn -> in_flight(llm) == 3 end)

      assert {:error, %Error{reason: :overloaded, message: message}} = ask(llm, "reply:x")
      assert message =~ "max_queue:"
    end

    test "larger than a frame are refused and do no harm" do
      llm = start!("ready", max_frame: 100_000)

      assert {:error, %Error{reason: :invalid_option, message: message}} =
               ask(llm, "reply:" <> String.duplicate("x", 200_000))

      assert message =~ "max_frame:"
      assert {:ok, "fits"} = ask(llm, "reply:fits")
    end

    test "never suspend their caller, even when the worker has stopped reading" do
      llm = start!()
      [{_worker, program}] = workers(llm)
      fake = worker_pid(program)
      assert signal("STOP", fake)

      # Far more than a pipe holds. A suspended caller would miss its deadline.
      prompt = "reply:" <> String.duplicate("x", 100_000)
      test = self()

      for n <- 1..20 do
        spawn(fn -> send(test, {n, ask(llm, prompt, timeout: 500)}) end)
      end

      for n <- 1..20, do: assert_receive({^n, {:error, %Error{reason: :timeout}}})
      assert signal("CONT", fake)
      assert {:ok, "awake"} = ask(llm, "reply:awake")
    end
  end

  describe "stopping" do
    test "ends the requests in flight and leaves nothing" do
      llm = start!("ready", shutdown_timeout: 100)
      {:ok, child} = ask(llm, "child")
      [{_worker, program}] = workers(llm)
      ask_in_background(llm, "hold")
      await_held(llm, 1)
      assert :ok = VLLM.stop(llm)
      assert_receive {:answer, {:error, %Error{reason: :shutdown}}}
      refute alive?(String.to_integer(child))
      refute alive?(program.os_pid)
      refute File.exists?(program.run_dir)
      assert {:error, %Error{reason: :not_running}} = ask(llm, "reply:x")
      assert :ok = VLLM.stop(llm)
    end

    test "works on a worker that does not react" do
      llm = start!()
      [{_worker, program}] = workers(llm)
      fake = worker_pid(program)
      assert signal("STOP", fake)
      assert :ok = VLLM.stop(llm)
      refute alive?(fake)
      refute File.exists?(program.run_dir)
    end

    test "happens by itself when the owner ends" do
      test = self()

      owner =
        spawn(fn ->
          llm = start!()
          {:ok, child} = ask(llm, "child")
          {:ok, _table, pid} = VLLM.Engine.Table.lookup(llm)
          send(test, {:started, llm, pid, String.to_integer(child)})
          Process.sleep(:infinity)
        end)

      assert_receive {:started, llm, pid, child}
      monitor = Process.monitor(pid)
      Process.exit(owner, :kill)
      assert_receive {:DOWN, ^monitor, :process, _, _}
      refute alive?(child)
      assert {:error, %Error{reason: :not_running}} = ask(llm, "reply:x")
    end

    test "also happens while it loads" do
      {:ok, config} = VLLM.Engine.Config.new(model: "hang", python: fake_python(), nursery: false)
      {:ok, pid} = VLLM.Engine.start(config)
      assert eventually(fn -> match?([{_, %{os_pid: _}}], workers(pid)) end)
      [{_worker, program}] = workers(pid)
      assert :ok = VLLM.stop(pid)
      refute alive?(program.os_pid)
      refute File.exists?(program.run_dir)
    end
  end

  describe "the guard" do
    test "killed takes the worker with it, and the engine comes back" do
      llm = start!()
      [{_worker, program}] = workers(llm)
      fake = worker_pid(program)
      ask_in_background(llm, "hold")
      await_held(llm, 1)
      assert signal("KILL", program.os_pid)
      assert_receive {:answer, {:error, %Error{reason: :engine_dead}}}
      assert eventually(fn -> not alive?(fake) end)
      assert {:ok, "again"} = ask(llm, "reply:again")
      refute File.exists?(program.run_dir)
    end
  end

  describe "streams" do
    test "yield their deltas and end" do
      llm = start!()

      assert [{:ok, %VLLM.Delta{text: "a"}}, {:ok, %VLLM.Delta{text: "b"}}] =
               Enum.to_list(VLLM.stream(llm, "delta:a;delta:b;reply:ab"))

      assert Enum.join(VLLM.stream_text!(llm, "delta:a;delta:b;reply:ab")) == "ab"
      refute_received _
    end

    test "take deltas in columns as they take rows" do
      llm = start!()
      prompt = "packed:ab,,c;packed:d;delta:e;reply:abcde"
      deltas = Enum.to_list(VLLM.stream!(llm, prompt))
      assert Enum.map(deltas, & &1.text) == ["ab", "", "c", "d", "e"]
      assert Enum.map(deltas, & &1.token_ids) == ['ab', [], 'c', 'd', []]
      assert %VLLM.Delta{index: 0, text: "c", token_ids: 'c'} == Enum.at(deltas, 2)

      ref = VLLM.stream_to(llm, "packed:a,b;reply:ab")
      assert_receive {:vllm, ^ref, %VLLM.Delta{text: "a", token_ids: 'a'}}
      assert_receive {:vllm, ^ref, %VLLM.Delta{text: "b", token_ids: 'b'}}
      assert_receive {:vllm, ^ref, {:done, _output}}
    end

    test "end with the error, which is the last element" do
      llm = start!()

      assert [{:ok, %{text: "a"}}, {:error, %Error{reason: :prompt_too_long}}] =
               Enum.to_list(VLLM.stream(llm, "delta:a;error:prompt_too_long"))

      assert {:error, %Error{reason: :timeout}} =
               List.last(Enum.to_list(VLLM.stream(llm, "delta:a;hold", timeout: 500)))

      await_held(llm, 0)

      assert [{:ok, %{text: "a"}}, {:error, %Error{reason: :engine_dead}}] =
               Enum.to_list(VLLM.stream(llm, "delta:a;kill"))

      assert_raise Error, fn -> Enum.to_list(VLLM.stream!(llm, "error:internal")) end

      assert [{:error, %Error{reason: :invalid_option}}] =
               Enum.to_list(VLLM.stream(llm, "x", tmp: 1))

      assert [{:error, %Error{reason: :not_running}}] = Enum.to_list(VLLM.stream(Nobody, "x"))
    end

    test "whose deltas make no sense end the run with a reason" do
      llm = start!()

      assert [{:ok, %{text: "a"}}, {:error, error}] =
               Enum.to_list(VLLM.stream(llm, "delta:a;misshapen"))

      assert %Error{reason: :protocol, message: message} = error
      assert message =~ "shape"
      assert {:ok, "again"} = ask(llm, "reply:again")
    end

    test "left early are aborted in the worker and leave no message" do
      llm = start!()
      assert [{:ok, %{text: "a"}}] = Enum.take(VLLM.stream(llm, "delta:a;delta:b;hold"), 1)
      await_held(llm, 0)
      refute_received _
    end

    test "are aborted when their own reading raises" do
      llm = start!()
      # No time can be waited for that is below 0.
      call = %{VLLM.Engine.Call.new(%{timeout: 5_000}) | inter_token_timeout: -1}
      prepare = fn -> {:ok, {llm, "generate", %{"prompt" => "delta:a;hold"}, call}} end
      assert_raise ErlangError, fn -> Enum.to_list(VLLM.Streaming.deltas(prepare)) end
      await_held(llm, 0)
      assert in_flight(llm) == 0
      refute_received _
    end

    test "wait by one timer for their deadline, which ends with them" do
      llm = start!()

      open = fn prompt, options ->
        call = VLLM.Engine.Call.begin(VLLM.Engine.Call.new(options))
        {:ok, reader} = Reader.open(llm, "generate", %{"prompt" => prompt}, call, Inbox.new())
        assert {{:delta, %VLLM.Delta{text: "a"}}, reader} = Reader.next(reader)
        reader
      end

      for how <- [&Reader.next/1, &Reader.close/1] do
        reader = open.("packed:a;reply:a", %{timeout: 60_000})
        assert :erlang.read_timer(reader.alarm) > 0
        how.(reader)
        refute :erlang.read_timer(reader.alarm)
      end

      # An alarm that has gone off by then ends them as a wait would.
      reader = open.("packed:a;hold", %{timeout: 2_000})
      assert {{:error, %Error{reason: :timeout}}, _reader} = Reader.next(reader)
      await_held(llm, 0)

      # Where each wait has its own limit there is none.
      options = %{timeout: 60_000, inter_token_timeout: 50}
      reader = open.("packed:a;hold", options)
      assert reader.alarm == nil
      assert {{:error, %Error{message: message}}, _reader} = Reader.next(reader)
      assert message =~ "inter_token_timeout"
    end

    test "are lazy" do
      llm = start!()
      stream = VLLM.stream(llm, "delta:a;reply:a")
      assert in_flight(llm) == 0
      assert length(Enum.to_list(stream)) == 1
      assert length(Enum.to_list(stream)) == 1
    end

    test "are enumerated a step at a time, too, as deltas and as texts" do
      llm = start!()
      prompt = "packed:ab,,c;reply:abc"
      assert [{%{text: "ab"}, 1}, {%{text: ""}, 2}] = Enum.zip(VLLM.stream!(llm, prompt), [1, 2])
      assert Enum.zip(VLLM.stream_text!(llm, prompt), [1, 2]) == [{"ab", 1}, {"c", 2}]
      await_held(llm, 0)
      refute_received _
    end

    for way <- ["delta", "packed"] do
      test "acknowledge what their reader has taken (#{way})" do
        llm = start!()
        prompt = Enum.map_join(1..64, ";", &"#{unquote(way)}:#{&1}") <> ";reply:done"
        assert length(Enum.to_list(VLLM.stream(llm, prompt))) == 64
        assert {:ok, "64"} = ask(llm, "credit")
      end
    end

    test "to a process that cancels are aborted, and no message comes any more" do
      llm = start!()
      ref = VLLM.stream_to(llm, "delta:a;hold")
      assert_receive {:vllm, ^ref, %VLLM.Delta{text: "a"}}
      assert :ok = VLLM.cancel(ref)
      await_held(llm, 0)
      refute_received {:vllm, ^ref, _}
      assert :ok = VLLM.cancel(ref)
    end

    test "to a process that dies are aborted" do
      llm = start!()
      receiver = spawn(fn -> Process.sleep(:infinity) end)
      VLLM.stream_to(llm, "delta:a;hold", receiver)
      await_held(llm, 1)
      Process.exit(receiver, :kill)
      await_held(llm, 0)
    end

    test "to a busy process tell it that they have begun, and wait until it reads" do
      llm = start!()
      for n <- 1..100, do: send(self(), {:busy, n})
      ref = VLLM.stream_to(llm, "delta:a;delta:b;reply:ab")
      assert_receive {:vllm, ^ref, %VLLM.Delta{text: "a"}}
      # The answer to this one shows that the worker has sent the deltas of the other.
      await_held(llm, 0)
      assert Process.info(self(), :message_queue_len) == {:message_queue_len, 100}
      for n <- 1..100, do: assert_receive({:busy, ^n})
      assert_receive {:vllm, ^ref, %VLLM.Delta{text: "b"}}
      assert_receive {:vllm, ^ref, {:done, _}}
    end

    test "to a process that does not read give it 64 messages, and the rest as it reads" do
      llm = start!()
      pieces = Enum.map(1..100, &to_string/1)
      ref = VLLM.stream_to(llm, "packed:#{Enum.join(pieces, ",")};reply:done")
      unread = fn -> self() |> Process.info(:message_queue_len) |> elem(1) end
      assert eventually(fn -> unread.() == 64 end)
      # All has come by then, and waits.
      await_held(llm, 0)
      assert unread.() == 64

      for piece <- pieces, do: assert_receive({:vllm, ^ref, %VLLM.Delta{text: ^piece}})
      assert_receive {:vllm, ^ref, {:done, _}}
    end

    test "to a process that is busy until the deadline give it all that has come, and the end" do
      llm = VLLM.Test.start!(script: %{"whole" => "ab", "begun" => {:deltas, ["a", :hang]}})
      for n <- 1..100, do: send(self(), {:busy, n})

      ref = VLLM.stream_to(llm, "whole", self(), timeout: 300)
      assert_receive {:vllm, ^ref, {:done, output}}
      assert VLLM.text(output) == "ab"
      assert_received {:vllm, ^ref, %VLLM.Delta{text: "ab"}}

      ref = VLLM.stream_to(llm, "begun", self(), timeout: 300)
      assert_receive {:vllm, ^ref, {:error, %Error{reason: :timeout}}}
      assert_received {:vllm, ^ref, %VLLM.Delta{text: "a"}}
    end

    test "to a process end with an error, whatever raises while they begin" do
      llm = VLLM.Test.start!(script: "x")
      raises = Stream.map([1], fn _ -> raise "secret" end)

      for {prompt, options} <- [{raises, []}, {"x", raises}] do
        ref = VLLM.stream_to(llm, prompt, self(), options)
        assert_receive {:vllm, ^ref, {:error, %Error{} = error}}
        refute inspect(error) =~ "secret"
      end

      # Not by way of VLLM, which knows its arguments.
      ref = VLLM.Streaming.Forwarder.start(self(), fn -> raise "secret" end)
      assert_receive {:vllm, ^ref, {:error, %Error{reason: :internal} = error}}
      assert error.message =~ "RuntimeError"
      refute inspect(error) =~ "secret"
    end

    test "to a process that another cancels end with :aborted, once" do
      llm = VLLM.Test.start!(script: {:deltas, ["a", :hang]})
      ref = VLLM.stream_to(llm, "x")
      assert_receive {:vllm, ^ref, %VLLM.Delta{text: "a"}}
      for task <- for(_ <- 1..4, do: Task.async(fn -> VLLM.cancel(ref) end)), do: Task.await(task)
      assert_receive {:vllm, ^ref, {:error, %Error{reason: :aborted}}}
      refute_received {:vllm, ^ref, _}
      assert eventually(fn -> in_flight(llm) == 0 end)
    end
  end

  describe "generate_stream" do
    test "yields each output with its index as it is done" do
      llm = start!()
      results = Enum.to_list(VLLM.generate_stream(llm, ["hold", "reply:b", "release"]))
      assert {1, {:ok, output}} = List.keyfind(results, 1, 0)
      assert VLLM.text(output) == "b"
      assert results |> Enum.map(&elem(&1, 0)) |> Enum.sort() == [0, 1, 2]
      assert hd(results) |> elem(0) == 1
    end

    test "goes on after a prompt that fails" do
      llm = start!()
      results = Map.new(VLLM.generate_stream(llm, ["reply:a", "", "error:internal", "reply:d"]))
      assert {:ok, _} = results[0]
      assert {:error, %Error{reason: :invalid_prompt}} = results[1]
      assert {:error, %Error{reason: :internal}} = results[2]
      assert {:ok, _} = results[3]
    end

    test "takes no more prompts than are computed at once, even from an endless source" do
      llm = start!("ready", max_in_flight: 4)
      test = self()

      prompts =
        Stream.repeatedly(fn ->
          send(test, :taken)
          "reply:x"
        end)

      assert length(Enum.take(VLLM.generate_stream(llm, prompts), 10)) == 10
      taken = Stream.repeatedly(fn -> receive(do: (:taken -> true), after: (0 -> false)) end)
      assert length(Enum.take_while(taken, & &1)) in 10..15
      await_held(llm, 0)
    end

    test "tells each prompt what stands in the way of all, when it is enumerated" do
      stream = VLLM.generate_stream(:nobody, ["a", "b"])

      assert [{0, {:error, %Error{reason: :not_running}}}, {1, {:error, _}}] =
               Enum.to_list(stream)

      assert [{0, {:error, %Error{details: %{"option" => "timout"}}}}] =
               :nobody |> VLLM.generate_stream(Stream.cycle(["a"]), timout: 5) |> Enum.take(1)
    end

    test "has a twin that raises" do
      llm = start!()
      stream = VLLM.generate_stream!(llm, ["reply:a", "error:internal"])
      assert_raise Error, ~r/says internal/, fn -> Enum.to_list(stream) end
      assert [{0, output}] = Enum.take(VLLM.generate_stream!(llm, ["reply:a"]), 1)
      assert VLLM.text(output) == "a"
      stream = VLLM.generate_stream!(:nobody, ["a"])
      assert_raise Error, ~r/no engine :nobody/, fn -> Enum.to_list(stream) end
    end

    test "ends each prompt at its own deadline" do
      llm = start!()
      results = Map.new(VLLM.generate_stream(llm, ["hold", "reply:b"], timeout: 2_000))
      assert {:error, %Error{reason: :timeout}} = results[0]
      assert {:ok, _} = results[1]
      await_held(llm, 0)
    end
  end

  describe "names" do
    test "an engine in a supervision tree answers to its name and survives its worker" do
      start_supervised!({VLLM.FakeEngine, name: Named, model: "ready"})
      assert :ok = VLLM.await_ready(Named)
      assert {:ok, "hello"} = ask(Named, "reply:hello")
      assert {:error, %Error{reason: :engine_dead}} = ask(Named, "kill")
      assert {:ok, "again"} = ask(Named, "reply:again")
    end

    test "an engine without a name answers to its pid, and global names work" do
      start_supervised!({VLLM.FakeEngine, name: {:global, :everywhere}, model: "ready"})
      assert {:ok, "hello"} = ask({:global, :everywhere}, "reply:hello")
      pid = start_supervised!({VLLM.FakeEngine, model: "ready"})
      assert {:ok, "hello"} = ask(pid, "reply:hello")
    end

    test "a second engine of the same name is refused" do
      start!("ready", name: Twice)

      assert {:error, %Error{reason: :invalid_option, message: message}} =
               start("ready", name: Twice)

      assert message =~ "Twice is running already"
      assert {:ok, "still here"} = ask(Twice, "reply:still here")
    end

    test "a name that another process has is refused, and the error says so" do
      {:ok, _} = Agent.start_link(fn -> nil end, name: AnAgent)
      assert {:error, %Error{reason: :invalid_option} = error} = start("ready", name: AnAgent)
      assert error.message =~ "AnAgent belongs to a process that is no engine"
      assert error.details["option"] == "name"
    end

    test "an owner that crashes with a request in flight starts its engine again" do
      test = self()

      script = fn %{prompt: prompt} ->
        send(test, {:asked, prompt})
        :hang
      end

      owner = fn ->
        llm = VLLM.Test.start!(name: Crashing, script: script, shutdown_timeout: 400)
        send(test, {:owner, self(), VLLM.Engine.Table.lookup(llm)})
        spawn(fn -> VLLM.generate(llm, "x") end)
        receive do: (:crash -> exit(:crash))
      end

      spec = %{id: :owner, start: {Task, :start_link, [owner]}, restart: :permanent}

      tree = start_supervised!({DynamicSupervisor, strategy: :one_for_one, max_restarts: 3})
      {:ok, _} = DynamicSupervisor.start_child(tree, spec)

      assert_receive {:owner, first, {:ok, _, engine}}
      assert_receive {:asked, "x"}
      send(first, :crash)
      assert_receive {:owner, second, {:ok, _, other}}
      assert first != second and engine != other
      refute Process.alive?(engine)
      assert_receive {:asked, "x"}
    end

    test "a tree that was killed with a request in flight starts its engine again" do
      test = self()
      script = fn _ -> send(test, :asked) && :hang end
      engine = {VLLM.Test, name: Killed, script: script, shutdown_timeout: 400}

      {:ok, tree} =
        Task.async(fn ->
          {:ok, tree} = Supervisor.start_link([engine], strategy: :one_for_one)
          Process.unlink(tree)
          {:ok, tree}
        end)
        |> Task.await()

      assert :ok = VLLM.await_ready(Killed)
      ask_in_background(Killed, "x")
      assert_receive :asked
      Process.exit(tree, :kill)
      assert {:ok, _} = Supervisor.start_link([engine], strategy: :one_for_one)
      assert :ok = VLLM.await_ready(Killed)
    end

    test "a name that nobody has is an error" do
      assert {:error, %Error{reason: :not_running, message: message}} = ask(Nobody, "reply:x")
      assert message =~ "Nobody"
    end
  end

  describe "replicas" do
    test "share the load" do
      llm = start!("ready", replicas: 2)
      for n <- 1..4, do: ask_in_background(llm, "hold", session: n)
      assert eventually(fn -> in_flight(llm) == 4 end)
      # Whichever each session belongs to, no worker has more than its share.
      {:ok, table, _pid} = VLLM.Engine.Table.lookup(llm)
      workers = VLLM.Engine.Table.workers(table)
      assert Enum.all?(workers, &(VLLM.Bridge.Connection.in_flight(&1.conn) in 1..3))
    end

    test "stand in for one another" do
      llm = start!("ready", replicas: 2)
      assert {:error, %Error{reason: :engine_dead}} = ask(llm, "kill")
      for n <- 1..20, do: assert({:ok, "still here"} = ask(llm, "reply:still here"), "call #{n}")
    end
  end

  describe "surroundings" do
    test "what the worker prints reaches Logger, with the engine's name and its level" do
      log =
        ExUnit.CaptureLog.capture_log(fn ->
          llm = start!("ready", name: Chatty)
          {:error, _} = ask(llm, "print:WARNING 11-20 19:00:00 [x.py:1] hot;exit:1")
          assert {:ok, _} = ask(llm, "reply:x")
        end)

      assert log =~ ~r/\[warning\].*Chatty: WARNING 11-20 19:00:00 \[x.py:1\] hot/
    end
  end

  defp fake_python, do: Path.expand("../support/fake_python", __DIR__)
end
