defmodule VLLM.OptionsTest do
  # What is said of options before anything is started or sent.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.Engine.Config
  alias VLLM.{Error, Options}

  defp invalid({:error, %Error{reason: :invalid_option} = error}), do: error

  describe "options that are given twice" do
    test "count as they first come, like those of Keyword.get/2" do
      options = [temperature: 0.5] ++ [temperature: 0.9, seed: 1]
      assert VLLM.sampling_params!(options).temperature == 0.5
      given = [replicas: 2, seed: 1] ++ [replicas: 3, seed: 2, model: "m"]
      assert {:ok, %{options: %{replicas: 2}} = config} = Config.new(given)
      assert config.engine_options == %{"seed" => 1}

      assert {:ok, config} = Config.new(model: "m", env: [A: "first", A: "second"])
      assert Config.env(config, 1) == %{"A" => "first"}
    end

    test "as an atom and as a string in a map are an error" do
      for call <- [
            &VLLM.sampling_params/1,
            &VLLM.generate(:nobody, "x", &1),
            &VLLM.llm("m", &1)
          ] do
        error = invalid(call.(%{:seed => 1, "seed" => 2}))
        assert error.message == "`seed` is given twice, as an atom and as a string; give it once."
        assert error.details == %{"option" => "seed"}
      end

      nested = %{a: %{:level => 1, "level" => 1}}
      error = invalid(VLLM.llm("m", compilation_config: nested))

      assert error.message =~
               "holds a name that is given twice, as an atom and as a string, at `a.level`"

      assert invalid(VLLM.llm("m", env: %{:A => "1", "A" => "2"})).details["option"] == "env"
    end
  end

  describe "options for vLLM" do
    test "may be keyword lists at any depth" do
      given = [model: "m", compilation_config: %{pass_config: [fuse: true], modes: [[on: :yes]]}]
      assert {:ok, config} = Config.new(given)

      assert config.engine_options["compilation_config"] ==
               %{"pass_config" => %{"fuse" => true}, "modes" => [%{"on" => "yes"}]}
    end

    test "that cannot be sent are refused with their place" do
      error = invalid(VLLM.llm("m", compilation_config: %{levels: [1, {2, 3}]}))

      assert error.message =~
               "`compilation_config` cannot be sent: it holds a tuple at `levels[1]`."

      path = ["compilation_config", "levels", 1]
      assert error.details == %{"option" => "compilation_config", "path" => path}

      for value <- [<<255>>, ~D[2026-01-01], {1}, 1..2, &is_atom/1, 2 ** 64, self()] do
        error = invalid(VLLM.llm("m", download_dir: value))
        assert error.details == %{"option" => "download_dir", "path" => ["download_dir"]}
      end

      assert invalid(VLLM.llm(<<"m", 255>>)).details == %{"option" => "model"}
    end

    test "of calls are refused in the same way, without an engine" do
      for {call, options} <- [
            {&VLLM.generate(:nobody, "x", &1), stop: ["a", {1}]},
            {&VLLM.generate(:nobody, "x", &1), sampling_params: [logit_bias: %{5 => 2 ** 64}]},
            {&VLLM.chat(:nobody, [%{role: "user", content: "x"}], &1), tools: [%{f: self()}]},
            {&VLLM.embed(:nobody, "x", &1), extra_kwargs: [now: ~T[00:00:00]]},
            {&VLLM.generate(:nobody, "x", &1), tokenization_kwargs: %{truncation_side: <<255>>}}
          ] do
        error = invalid(call.(options))
        assert [option, _ | _] = error.details["path"]
        assert error.details["option"] == option
        assert error.message =~ "`#{option}` cannot be sent: it holds "
      end

      bad = %VLLM.LoRARequest{lora_name: {1}, lora_int_id: 1, lora_path: "/a"}
      error = invalid(VLLM.generate(:nobody, "x", lora_request: bad))
      assert error.details["path"] == ["lora_request", "lora_name"]
    end
  end

  describe "options of odd shapes" do
    @odd [nil, 5, "x", {1}, [1], [{1, 2}], [{"a", 1}], [{:a, 1} | :b], %{{1} => 2}] ++
           [%{<<255>> => 1}, ~D[2026-01-01], 1..2, [[a: 1]], self()]

    test "are invalid in every function that takes options" do
      message = [%{role: "user", content: "x"}]

      for odd <- @odd,
          call <- [
            &VLLM.llm("m", &1),
            &VLLM.generate(:nobody, "x", &1),
            &VLLM.beam_search(:nobody, "x", &1),
            &VLLM.chat(:nobody, message, &1),
            &VLLM.apply_chat_template(:nobody, message, &1),
            &VLLM.embed(:nobody, "x", &1),
            &VLLM.rerank(:nobody, "x", ["y"], &1),
            &VLLM.tokenize(:nobody, "x", &1),
            &VLLM.scale(:nobody, 1, &1),
            &VLLM.health(:nobody, &1),
            &VLLM.sleep(:nobody, &1),
            &VLLM.sampling_params/1,
            &VLLM.lora_request("a", "/a", &1)
          ] do
        error = invalid(call.(odd))
        assert error.message =~ "keyword list or a map", inspect(odd)
      end
    end

    test "as values are invalid, with the option" do
      for {name, value} <- [
            env: ~D[2026-01-01],
            env: [%{"A" => "1"} | :end],
            env: [[%{"A" => "1"}]],
            env: %{"A" => <<255>>},
            env: %{<<255>> => "1"},
            devices: [[0] | :end],
            devices: [[0 | 1]],
            name: :undefined,
            name: {:via, NoSuchModule, :name},
            name: {:via, Enum, :name},
            python: <<255>>
          ] do
        assert invalid(VLLM.llm("m", [{name, value}])).details["option"] == to_string(name)
      end

      for value <- [5, {1}, [1], ~D[2026-01-01]],
          name <- [:sampling_params, :tokenization_kwargs] do
        error = invalid(VLLM.generate(:nobody, "x", [{name, value}]))
        assert error.details["option"] == to_string(name)
      end
    end

    test "and so are prompts and texts that are lists with another end" do
      for call <- [
            fn -> VLLM.generate(:nobody, ["a" | "b"]) end,
            fn -> VLLM.generate(:nobody, %{prompt_token_ids: [1 | 2]}) end,
            fn -> VLLM.generate(:nobody, %{prompt: "a", multi_modal_data: 1..2}) end,
            fn -> VLLM.generate(:nobody, %{prompt: "a", multi_modal_data: %{{1} => 2}}) end,
            fn -> VLLM.tokenize(:nobody, ["a" | "b"]) end,
            fn -> VLLM.tokenize(:nobody, <<255>>) end,
            fn -> VLLM.score(:nobody, "a", ["b" | "c"]) end,
            fn -> VLLM.chat(:nobody, [%{role: "user", content: "x"} | :end]) end
          ] do
        assert {:error, %Error{reason: :invalid_prompt}} = call.()
      end
    end
  end

  describe "times" do
    test "that no timer takes are refused" do
      for time <- [2 ** 32, -1, 1.5, nil, :soon] do
        assert invalid(VLLM.generate(:nobody, "x", timeout: time)).details["option"] == "timeout"
        assert invalid(VLLM.await_ready(:nobody, time)).details["option"] == "timeout"
        assert invalid(VLLM.engine_info(:nobody, time)).details["option"] == "timeout"
        assert invalid(VLLM.llm("m", shutdown_timeout: time)).message =~ "0 to 4294967295"
        assert invalid(VLLM.llm("m", load_timeout: time)).details["option"] == "load_timeout"
      end
    end

    test "of as long as one takes are taken" do
      test = self()

      script = fn request ->
        if request.params["prompt"] == "hold" do
          send(test, {:held, self()})
          receive do: (:go -> "Paris")
        else
          "Paris"
        end
      end

      llm = VLLM.Test.start!(script: script, shutdown_timeout: 2 ** 32 - 1)
      times = [timeout: 2 ** 32 - 1, queue_timeout: 2 ** 32 - 1]
      assert {:ok, [output]} = VLLM.generate(llm, "x", times)
      assert VLLM.text(output) == "Paris"
      assert :ok = VLLM.await_ready(llm, 2 ** 32 - 1)
      assert :ok = VLLM.await_ready(llm, :infinity)
      assert {:ok, _info} = VLLM.engine_info(llm, 2 ** 32 - 1)

      call = Task.async(fn -> VLLM.generate(llm, "hold", times) end)
      assert_receive {:held, held}
      stop = Task.async(fn -> VLLM.stop(llm) end)
      assert eventually(fn -> match?({:ok, [%{state: :draining}]}, VLLM.replicas(llm)) end)
      send(held, :go)
      assert {:ok, [_output]} = Task.await(call)
      assert :ok = Task.await(stop)
    end
  end

  test "a misspelt option is one of the question's own where that is nearest" do
    error = fn name, nearest ->
      details = %{"option" => name, "nearest" => nearest}
      Error.new(:invalid_option, "Unknown engine option `#{name}`.", details)
    end

    nearest = fn name, theirs, specs ->
      Options.or_ours(error.(name, theirs), specs).details["nearest"]
    end

    assert nearest.("stall_timout", nil, Options.pull()) == "stall_timeout"
    assert nearest.("concurency", "max_concurrency", Options.estimate()) == "concurrency"
    assert nearest.("max_model_lenn", "max_model_len", Options.estimate()) == "max_model_len"
    assert nearest.("device", "RTX 4090 24GB", Options.estimate()) == "RTX 4090 24GB"
    # Engines are started without it.
    refute nearest.("stall_timout", nil, []) == "stall_timeout"
  end

  test "an option that several calls take is the same in all of them" do
    all =
      [:engine, :drain, :generate, :stream, :chat, :beam_search, :encode, :rerank] ++
        [:tokenize, :detokenize, :sleep, :lora_request]

    # Of a score a template makes something else than of a conversation.
    texts = for list <- all, {name, _, _, _} = spec <- apply(Options, list, []), do: {name, spec}

    differing =
      for {name, specs} <- Enum.group_by(texts, &elem(&1, 0), &elem(&1, 1)),
          length(Enum.uniq(specs)) > 1,
          do: name

    assert Enum.sort(differing) == [:chat_template, :timeout]
  end

  test "a name that its registry does not take is a wrong name" do
    for {name, why} <- [
          {{:via, Registry, :x}, "no function clause"},
          {{:via, Registry, {Nowhere, :x}}, "unknown registry: Nowhere"}
        ] do
      assert {:error, %Error{reason: :invalid_option} = error} = VLLM.llm("model", name: name)
      assert error.message =~ why
      assert error.details == %{"option" => "name"}
    end
  end
end
