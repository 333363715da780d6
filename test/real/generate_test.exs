defmodule VLLM.Real.GenerateTest do
  # The real vLLM engine on the demo model, one engine for the whole module.
  use ExUnit.Case

  alias VLLM.{DemoModel, DocExamples, Error, Prometheus}

  @moduletag timeout: 300_000

  setup_all do
    # A model that was not trained to write JSON may go on with spaces for ever.
    compact = [backend: "xgrammar", disable_any_whitespace: true]
    %{llm: DemoModel.start!("demo", name: MyApp.LLM, structured_outputs_config: compact)}
  end

  test "the model says every sentence that it knows", %{llm: llm} do
    assert length(DemoModel.facts()) >= 40
    assert DemoModel.wrong_facts(llm) == []
  end

  test "an output has vLLM's fields", %{llm: llm} do
    {prompt, completion} = hd(DemoModel.facts())
    assert [output] = VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64)
    assert %VLLM.RequestOutput{prompt: ^prompt, finished: true, prompt_logprobs: nil} = output
    assert [%VLLM.CompletionOutput{index: 0, finish_reason: "stop"} = completed] = output.outputs
    assert completed.text == completion
    assert completed.text == VLLM.text(output)
    assert Enum.all?(output.prompt_token_ids ++ completed.token_ids, &is_integer/1)
    assert output.metrics["num_generation_tokens"] == length(completed.token_ids)
  end

  test "token ids complete like the text that they stand for", %{llm: llm} do
    {prompt, completion} = hd(DemoModel.facts())
    [%{prompt_token_ids: ids}] = VLLM.generate!(llm, prompt, max_tokens: 1)

    assert [output] =
             VLLM.generate!(llm, %{prompt_token_ids: ids}, temperature: 0.0, max_tokens: 64)

    assert VLLM.text(output) == completion
    assert output.prompt_token_ids == ids
  end

  test "64 processes at once each get their own right answer", %{llm: llm} do
    facts = DemoModel.facts() |> Stream.cycle() |> Enum.take(64)

    answers =
      facts
      |> Task.async_stream(
        fn {prompt, _} -> VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64) end,
        max_concurrency: 64,
        timeout: 60_000
      )
      |> Enum.map(fn {:ok, [output]} -> VLLM.text(output) end)

    assert answers == Enum.map(facts, &elem(&1, 1))
  end

  test "how fast it is can be measured", %{llm: llm} do
    options = [
      num_prompts: 6,
      random_input_len: 12,
      random_output_len: 5,
      max_concurrency: [1, 3]
    ]

    assert {:ok, bench} = VLLM.Bench.run(llm, options ++ [rounds: 1, num_warmups: 1])
    assert [%{max_concurrency: 1}, %{max_concurrency: 3}] = bench.runs

    for %{figures: figures} = run <- bench.runs do
      # Random tokens are counted as they are, and an end token ends no answer.
      assert %{completed: 6, total_input_tokens: 72, total_output_tokens: 30} = figures
      assert figures.median_ttft_ms > 0 and figures.median_ttft_ms < figures.median_e2el_ms
      assert figures.cpu_ms_per_1k_tokens > 0
      # The model alone has eight megabytes.
      assert run.memory > 8_000_000
    end
  end

  test "n completions with a seed can be repeated", %{llm: llm} do
    params = VLLM.sampling_params!(temperature: 1.5, top_p: 0.95, seed: 7, n: 2, max_tokens: 12)
    assert [first] = VLLM.generate!(llm, "The", sampling_params: params)
    assert [again] = VLLM.generate!(llm, "The", sampling_params: params)
    assert [%{index: 0}, %{index: 1}] = first.outputs
    assert Enum.map(first.outputs, & &1.token_ids) == Enum.map(again.outputs, & &1.token_ids)
    assert [one, two] = Enum.map(first.outputs, & &1.text)
    assert one != two
  end

  test "log probabilities belong to the tokens and add up", %{llm: llm} do
    {prompt, _} = hd(DemoModel.facts())

    [output] =
      VLLM.generate!(llm, prompt,
        temperature: 0.0,
        max_tokens: 64,
        logprobs: 3,
        prompt_logprobs: 1
      )

    [completion] = output.outputs
    assert length(completion.logprobs) == length(completion.token_ids)

    chosen =
      for {place, id} <- Enum.zip(completion.logprobs, completion.token_ids) do
        assert %VLLM.Logprob{rank: 1, logprob: logprob} = place[id]
        assert map_size(place) in 3..4
        logprob
      end

    assert_in_delta Enum.sum(chosen), completion.cumulative_logprob, 0.001
    assert Enum.all?(chosen, &(&1 <= 0.0 and &1 > -0.5))

    assert [nil | places] = output.prompt_logprobs
    assert length(places) == length(output.prompt_token_ids) - 1
    for {place, id} <- Enum.zip(places, tl(output.prompt_token_ids)), do: assert(place[id])
  end

  test "a prompt that is too long can be cut on either side", %{llm: llm} do
    {fact, completion} = hd(DemoModel.facts())
    long = String.duplicate("The capital of France is Paris. ", 1000)
    ids = VLLM.tokenize!(llm, long <> fact)
    assert length(ids) > 1024

    ask = fn prompt, kwargs ->
      options = [temperature: 0.0, max_tokens: 64, tokenization_kwargs: kwargs]
      [output] = VLLM.generate!(llm, prompt, options)
      output
    end

    kept = length(VLLM.tokenize!(llm, fact))

    for prompt <- [long <> fact, %{prompt_token_ids: ids}] do
      left = ask.(prompt, truncate_prompt_tokens: kept, truncation_side: "left")
      assert left.prompt_token_ids == Enum.take(ids, -kept)
      right = ask.(prompt, truncate_prompt_tokens: 7, truncation_side: "right")
      assert right.prompt_token_ids == Enum.take(ids, 7)
      # One token is left for the answer.
      assert %{outputs: [%{token_ids: [_]}]} = all = ask.(prompt, truncate_prompt_tokens: -1)
      assert length(all.prompt_token_ids) == 1023
    end

    # The tokenizer keeps its beginning-of-text token, so what is left is a prompt that is known.
    output = ask.(long <> fact, truncate_prompt_tokens: kept)
    assert output.prompt_token_ids == [hd(ids) | Enum.take(ids, 1 - kept)]
    assert VLLM.text(output) == completion

    options = [max_tokens: 4, tokenization_kwargs: %{truncate_prompt_tokens: 5}]
    assert [_ | _] = llm |> VLLM.stream!(long, options) |> Enum.to_list()
    assert [chat] = VLLM.chat!(llm, [%{role: "user", content: long}], options)
    assert length(chat.prompt_token_ids) == 5

    for {name, value} <- [
          truncation_side: "up",
          truncate_prompt_tokens: 2000,
          truncate_prompt_token: 7
        ] do
      assert {:error, %Error{reason: :invalid_option, details: details}} =
               VLLM.generate(llm, long, tokenization_kwargs: [{name, value}])

      assert details["option"] == Atom.to_string(name)
    end
  end

  test "a stop string ends the completion and is named", %{llm: llm} do
    {prompt, completion} = hd(DemoModel.facts())
    stop = String.slice(completion, -3, 3)
    assert [output] = VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64, stop: [stop])

    assert [%{finish_reason: "stop", stop_reason: ^stop, text: text}] = output.outputs
    assert text == String.replace_suffix(completion, stop, "")
  end

  @tag :tmp_dir
  test "the examples of the docs run", %{llm: llm, tmp_dir: dir} do
    prompts = Path.join(dir, "prompts.txt")
    File.write!(prompts, Enum.map(DemoModel.facts(), fn {prompt, _} -> [prompt, "\n"] end))
    DocExamples.run(:generating, llm, %{"prompts.txt" => prompts})
  end

  test "a list of no prompts has no outputs", %{llm: llm} do
    assert VLLM.generate!(llm, []) == []
  end

  test "engine_info tells what runs", %{llm: llm} do
    assert {:ok, info} = VLLM.engine_info(llm)
    assert info.model == DemoModel.path()
    assert info.model_type == "llama"
    assert info.dtype == "bfloat16"
    assert info.quantization == nil
    assert info.max_model_len == 1024
    assert info.tensor_parallel_size == 1
    cores = System.schedulers_online()
    assert info.distributed_executor_backend == if(cores <= 4, do: "uni", else: "mp")
    assert info.vllm_version == VLLM.Python.vllm_version()
    assert info.kv_cache_tokens > info.max_model_len
    assert "generate" in info.tasks
  end

  describe "sampling parameters do what they say" do
    setup %{llm: llm} do
      {prompt, completion} = hd(DemoModel.facts())
      [output] = VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64)
      [%{token_ids: ids}] = output.outputs

      ask = fn params ->
        [output] = VLLM.generate!(llm, prompt, [temperature: 0.0, max_tokens: 12] ++ params)
        hd(output.outputs)
      end

      %{ask: ask, ids: ids, completion: completion}
    end

    test "logit_bias lifts a token over all others", %{ask: ask} do
      assert ask.(logit_bias: %{300 => 100}, ignore_eos: true).token_ids ==
               List.duplicate(300, 12)
    end

    test "allowed_token_ids are the only ones that come", %{ask: ask} do
      assert Enum.all?(ask.(allowed_token_ids: [300, 301]).token_ids, &(&1 in [300, 301]))
    end

    test "bad_words do not come", %{ask: ask, completion: completion} do
      word = String.trim(completion, ".")
      assert ask.([]).text =~ word
      refute ask.(bad_words: [String.trim(word)]).text =~ word
    end

    test "min_tokens keeps the end away", %{ask: ask, ids: ids} do
      assert length(ids) < 12
      assert length(ask.(min_tokens: 12).token_ids) == 12
    end

    test "stop_token_ids end the completion and are named", %{ask: ask, ids: [first | _]} do
      assert %{finish_reason: "stop", stop_reason: ^first, token_ids: [^first]} =
               ask.(stop_token_ids: [first])
    end

    test "penalties drive repetitions away", %{llm: llm} do
      text = fn params ->
        VLLM.text(
          hd(VLLM.generate!(llm, "Count:", [temperature: 0.0, max_tokens: 300] ++ params))
        )
      end

      counted = text.([])
      assert counted =~ "sixty"
      assert text.(frequency_penalty: 2.0) != counted
      assert text.(repetition_penalty: 2.0) != counted
    end

    test "top_k, top_p and min_p of one token are greedy at any temperature", %{
      ask: ask,
      ids: ids
    } do
      for narrow <- [[top_k: 1], [top_p: 1.0e-6], [min_p: 1.0]] do
        assert ask.([temperature: 2.0] ++ narrow).token_ids == ids
      end
    end
  end

  describe "structured outputs" do
    @schema %{
      type: "object",
      properties: %{colour: %{enum: ["red", "blue"]}, count: %{enum: [7, 12]}},
      required: ["colour", "count"],
      additionalProperties: false
    }
    @same_schema ~S({"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"enum": [7, 12]}},
      "required": ["colour", "count"], "additionalProperties": false})

    test "a choice, a regular expression, a grammar and JSON are conformed to", %{llm: llm} do
      text = fn params ->
        [output] =
          VLLM.generate!(llm, "The",
            max_tokens: 64,
            structured_outputs: VLLM.structured_outputs!(params)
          )

        VLLM.text(output)
      end

      assert text.(choice: ["yes", "no"]) in ["yes", "no"]
      assert text.(regex: "[0-9]{3}-[a-f]{2}") =~ ~r/\A[0-9]{3}-[a-f]{2}\z/
      assert text.(grammar: ~s(root ::= "up" | "down")) in ["up", "down"]
      assert text.(json: @schema) =~ ~r/\A\{"colour":"(red|blue)","count":(7|12)\}\z/
    end

    test "a schema's value is parsed", %{llm: llm} do
      for schema <- [@schema, @same_schema] do
        [output] = VLLM.generate!(llm, "The", schema: schema, max_tokens: 200, temperature: 0.0)

        assert [%{finish_reason: "stop", parsed: %{"colour" => colour, "count" => count}}] =
                 output.outputs

        assert colour in ["red", "blue"] and count in [7, 12]
      end
    end

    test "what was cut off is not parsed, and without a schema nothing is", %{llm: llm} do
      [output] = VLLM.generate!(llm, "The", schema: @schema, max_tokens: 2)
      assert [%{parsed: nil, finish_reason: "length"}] = output.outputs
      [output] = VLLM.generate!(llm, "The", max_tokens: 4, structured_outputs: [choice: ["12"]])
      assert [%{parsed: nil, text: "12"}] = output.outputs
    end

    test "a malformed one is refused with the reason, between two that are answered", %{llm: llm} do
      good = [max_tokens: 8, structured_outputs: [choice: ["yes"]]]
      assert VLLM.text(VLLM.generate!(llm, "The", good)) == ["yes"]

      for wrong <- [
            [regex: "[0-9"],
            [grammar: "root ::= ("],
            [json: %{type: "nonsense"}],
            [json: "{not json"],
            [choice: []],
            [regex: "a", choice: ["b"]],
            []
          ] do
        assert {:error, %Error{reason: :invalid_option} = error} =
                 VLLM.generate(llm, "The", structured_outputs: VLLM.structured_outputs!(wrong)),
               inspect(wrong)

        assert error.details["option"] == "structured_outputs"
        refute Map.has_key?(error.details, "traceback")
      end

      assert {:error, %Error{reason: :invalid_option} = error} =
               VLLM.generate(llm, "The", schema: %{type: "nonsense"})

      assert error.details["option"] == "schema"
      assert error.message =~ "`schema`"

      # One that can be read, and that nothing can follow.
      nothing = %{"$ref" => "#"}
      assert {:error, error} = VLLM.generate(llm, ["The", "A"], schema: nothing)
      assert %Error{reason: :invalid_option, details: %{"option" => "schema"}} = error
      assert %{"prompt_index" => _, "outputs" => [%{"finish_reason" => "error"}]} = error.details
      assert [{:error, error}] = Enum.to_list(VLLM.stream(llm, "The", schema: nothing))
      assert error.details["option"] == "schema"

      assert {:error, %Error{reason: :invalid_option, message: message}} =
               VLLM.generate(llm, "The", schema: @schema, structured_outputs: [regex: "a"])

      assert message =~ "give one of them"
      assert VLLM.text(VLLM.generate!(llm, "The", good)) == ["yes"]
    end
  end

  describe "beam search" do
    test "the best beam is the right completion", %{llm: llm} do
      [{prompt, completion}, {other, other_completion} | _] = DemoModel.facts()
      params = VLLM.beam_search_params!(beam_width: 4, max_tokens: 64)

      assert [output, another] =
               VLLM.beam_search!(llm, [prompt, other], beam_search_params: params)

      assert %VLLM.BeamSearchOutput{prompt: ^prompt, sequences: [best | _] = beams} = output
      assert %VLLM.BeamSearchSequence{text: ^completion, finish_reason: "stop"} = best
      assert hd(another.sequences).text == other_completion
      assert length(beams) == 4
      assert VLLM.detokenize!(llm, output.prompt_token_ids) == prompt
      assert VLLM.detokenize!(llm, best.tokens) == completion
    end

    test "beams come with their log probabilities, best first", %{llm: llm} do
      {prompt, _} = hd(DemoModel.facts())
      options = [beam_width: 4, max_tokens: 5, length_penalty: 0.0, ignore_eos: true]
      assert {:ok, [%{sequences: beams}]} = VLLM.beam_search(llm, prompt, options)
      sums = Enum.map(beams, & &1.cum_logprob)
      assert sums == Enum.sort(sums, :desc)

      for beam <- beams do
        assert beam.finish_reason == "length"
        chosen = for {place, id} <- Enum.zip(beam.logprobs, beam.tokens), do: place[id].logprob
        assert length(chosen) == 5
        assert_in_delta Enum.sum(chosen), beam.cum_logprob, 0.001
      end
    end

    test "what is wrong is named, and the engine goes on", %{llm: llm} do
      right = [beam_width: 2, max_tokens: 2]

      for {name, value} <- [beam_width: 0, beam_width: 11, max_tokens: 0, length_penalty: "long"] do
        assert {:error, %Error{reason: :invalid_option, message: message}} =
                 VLLM.beam_search(llm, "The", Keyword.put(right, name, value))

        assert message =~ Atom.to_string(name)
      end

      assert {:error, %Error{reason: :invalid_option, message: message}} =
               VLLM.beam_search(llm, "The", max_tokens: 2)

      assert message == "`beam_width` must be given."

      assert {:error, %Error{reason: :invalid_option, details: %{"nearest" => "beam_width"}}} =
               VLLM.beam_search(llm, "The", beam_with: 2)

      assert {:error, %Error{reason: :timeout}} =
               VLLM.beam_search(llm, "The",
                 beam_width: 4,
                 max_tokens: 1000,
                 ignore_eos: true,
                 timeout: 50
               )

      assert [%{sequences: [_, _]}] = VLLM.beam_search!(llm, "The", right)
    end
  end

  describe "around it" do
    test "tokens and text are turned into each other", %{llm: llm} do
      {prompt, _} = hd(DemoModel.facts())
      [%{prompt_token_ids: ids}] = VLLM.generate!(llm, prompt, max_tokens: 1)
      assert VLLM.tokenize(llm, prompt) == {:ok, ids}
      assert VLLM.tokenize!(llm, [prompt, prompt]) == [ids, ids]
      assert {:ok, bare} = VLLM.tokenize(llm, prompt, add_special_tokens: false)
      assert bare == tl(ids)
      assert VLLM.detokenize!(llm, ids) == prompt
      assert VLLM.detokenize!(llm, ids, skip_special_tokens: false) != prompt

      for {text, _} <- DemoModel.facts(),
          do: assert(VLLM.detokenize!(llm, VLLM.tokenize!(llm, text)) == text)

      assert {:error, %Error{reason: :invalid_prompt}} = VLLM.detokenize(llm, [4_000_000])
      assert {:error, %Error{reason: :invalid_prompt}} = VLLM.detokenize(llm, ["a"])
      assert {:error, %Error{reason: :invalid_prompt}} = VLLM.tokenize(llm, 7)
    end

    test "a repeated prompt is found in the prefix cache until that is reset", %{llm: llm} do
      prompt = String.duplicate("The capital of France is Paris. ", 30)
      cached = fn -> hd(VLLM.generate!(llm, prompt, max_tokens: 1)).num_cached_tokens end
      cached.()
      assert cached.() > 0
      assert :ok = VLLM.reset_prefix_cache(llm)
      assert cached.() == 0
    end

    test "metrics count what was done", %{llm: llm} do
      assert {:ok, before} = VLLM.metrics(llm)
      [output] = VLLM.generate!(llm, "The", max_tokens: 7, ignore_eos: true)
      assert {:ok, now} = VLLM.metrics(llm)
      assert now["generation_tokens"] - before["generation_tokens"] == 7
      assert now["prompt_tokens"] - before["prompt_tokens"] == length(output.prompt_token_ids)
      assert now["num_requests_running"] == 0
      assert %{"count" => count, "sum" => sum} = now["time_to_first_token_seconds"]
      assert count == before["time_to_first_token_seconds"]["count"] + 1
      assert sum > 0
    end

    test "Prometheus' metrics are vLLM's own, and those that the dashboard, the alerts and the guide name",
         %{llm: llm} do
      before = of_vllm(llm)
      VLLM.generate!(llm, "The", max_tokens: 7, ignore_eos: true)
      now = of_vllm(llm)

      assert now["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 7
      assert now["vllm:num_requests_running"] == 0
      assert now["process_resident_memory_bytes"] > 10_000_000

      queries = Prometheus.dashboard_queries() ++ Prometheus.alert_queries()
      guide = File.read!("guides/observability.md")
      named = for [_, name] <- Regex.scan(~r/`((?:vllm:|process_)\w+)`/, guide), do: name
      assert length(named) > 15

      for name <- Enum.flat_map(queries, &Prometheus.metrics/1) ++ named,
          not String.starts_with?(name, "vllm_bridge_"),
          do: assert(is_map_key(now, name) or is_map_key(now, name <> "_count"), name)

      refute VLLM.Metrics.text!() =~ DemoModel.path()
    end

    # One series of each metric of an engine.
    defp of_vllm(llm) do
      text = VLLM.Metrics.text!(timeout: 300_000)

      for {{name, %{"engine" => engine} = labels}, value} <- Prometheus.series(text),
          engine == inspect(llm.id),
          into: %{} do
        if model = labels["model_name"], do: assert(model == "demo")
        {name, value}
      end
    end

    test "an engine that is well says so", %{llm: llm} do
      assert :ok = VLLM.health(llm)
    end

    test "a device that cannot sleep says so, and what to do", %{llm: llm} do
      assert {:error, %Error{reason: :unsupported, message: message}} = VLLM.sleep(llm)
      assert message =~ "cpu cannot sleep"
      assert {:error, %Error{reason: :unsupported}} = VLLM.wake_up(llm)
      assert {:error, %Error{reason: :invalid_option}} = VLLM.sleep(llm, levle: 2)
    end
  end

  describe "bad input is a typed error, and the engine goes on" do
    setup %{llm: llm} do
      on_exit(fn ->
        {prompt, completion} = hd(DemoModel.facts())
        assert [output] = VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64)
        assert VLLM.text(output) == completion
      end)
    end

    test "a prompt that does not fit", %{llm: llm} do
      prompt = String.duplicate("The capital of France is Paris. ", 1000)
      assert {:error, %Error{reason: :prompt_too_long} = error} = VLLM.generate(llm, prompt)
      assert error.message =~ "1024"
      refute Map.has_key?(error.details, "traceback")
    end

    test "a token that the model does not have", %{llm: llm} do
      assert {:error, %Error{reason: :invalid_prompt}} =
               VLLM.generate(llm, %{prompt_token_ids: [1, 4_000_000]})
    end

    for {name, value} <- [temperature: -1.0, top_p: 2.0, n: 0, max_tokens: "many", logprobs: -2] do
      test "#{name}: #{inspect(value)}", %{llm: llm} do
        name = unquote(name)

        assert {:error, %Error{reason: :invalid_option} = error} =
                 VLLM.generate(llm, "The", [{name, unquote(value)}])

        assert error.details["option"] == Atom.to_string(name)
        assert error.message =~ Atom.to_string(name)
      end
    end

    test "one bad prompt among good ones", %{llm: llm} do
      prompts = ["The", %{prompt_token_ids: [4_000_000]}, "The"]

      assert {:error, %Error{reason: :invalid_prompt, details: %{"prompt_index" => 1}}} =
               VLLM.generate(llm, prompts)
    end

    test "embeddings, which the engine was not started for", %{llm: llm} do
      prompt = %{prompt_embeds: <<0::size(256)-unit(32)>>, shape: {1, 256}}
      assert {:error, %Error{reason: :unsupported} = error} = VLLM.generate(llm, prompt)
      assert error.message =~ "`enable_prompt_embeds: true`"
    end

    test "a priority that the scheduler would not look at", %{llm: llm} do
      assert {:error, %Error{reason: :invalid_option, message: message}} =
               VLLM.generate(llm, "The", priority: 3)

      assert message =~ "scheduling_policy"
    end

    test "an adapter, which takes an engine that was told of it", %{llm: llm} do
      lora = VLLM.lora_request!("demo", DemoModel.path("demo-lora"))

      for call <- [
            &VLLM.generate(&1, "The", lora_request: lora),
            &VLLM.load_lora(&1, lora),
            &VLLM.unload_lora(&1, lora),
            &VLLM.list_loras/1
          ] do
        assert {:error, %Error{reason: :unsupported, details: details}} = call.(llm)
        assert details["option"] == "enable_lora"
      end
    end

    test "a vector, which takes another runner", %{llm: llm} do
      for {call, convert} <- [
            {&VLLM.embed(&1, "The"), "embed"},
            {&VLLM.classify(&1, "The"), "classify"},
            {&VLLM.encode(&1, "The"), "embed"},
            {&VLLM.score(&1, "The", "The"), "embed"}
          ] do
        assert {:error, %Error{reason: :unsupported, message: message}} = call.(llm)
        assert message =~ ~s(`runner: "pooling", convert: "#{convert}"`)
      end
    end

    test "a deadline that passes aborts the request", %{llm: llm} do
      assert {:error, %Error{reason: :timeout}} =
               VLLM.generate(llm, "Count:", max_tokens: 1000, ignore_eos: true, timeout: 50)
    end
  end
end
