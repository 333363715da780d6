defmodule VLLM.Job.Quantize do
  @moduledoc false
  # The kind of job that quantizes a model. Its steps, each but the first few once
  # for each output:
  #
  #     check       are the formats and options known? (before a download)
  #     names       are the names free that the outputs are to have?
  #     pull        where is the model? It may have to be downloaded
  #     look        what do its files say, so that a change is seen?
  #     check       can this model be made in these formats?
  #     plan        how much memory and disk will that take?
  #     quantize    an output, in the job's folder
  #     measure     the model itself, once; then the output
  #     compare     what was lost
  #     publish     the output gets its place among the models
  #     register    and its name

  @behaviour VLLM.Job.Kind

  alias VLLM.{AllowedModels, Error, Fields, Options, Params, Python, Tools}
  alias VLLM.Bridge.Session
  alias VLLM.Job.{Estimate, Output, Record, Settings, Source, Step, Steps, Store}

  # Where these are the matter, the other outputs would fare no better.
  @of_all [
    :disk_full,
    :cache_not_writable,
    :source_changed,
    :python_not_found,
    :vllm_not_installed,
    :quantize_not_installed
  ]

  # Its libraries take their time to be imported, in ms.
  @look_timeout 300_000

  @doc "The record of a new job, from what the user gave; `known` are the checked options."
  @spec new(String.t(), map()) :: {:ok, Record.t()} | {:error, Error.t()}
  def new(model, known) do
    with {:ok, model} <- Options.check(:string, :model, model),
         model = Options.expand(model),
         :ok <- AllowedModels.check(model, known.allowed_models),
         {:ok, asked} <- asked(known.to),
         {:ok, calibration} <- calibration(known.calibration),
         {:ok, texts} <- texts(known.texts),
         {:ok, name} <- folder(known.name, model) do
      options = %{
        "to" => asked,
        "calibration" => calibration,
        "max_samples" => known.max_samples,
        "max_length" => known.max_length,
        "verify" => known.verify,
        "texts" => texts,
        # As the hub is asked.
        "engine" => given(known, [:revision, :subfolder, :download_dir]),
        "workers" => given(known, Options.names(Options.workers()))
      }

      {:ok,
       %Record{
         id: Record.new_id(),
         kind: :quantize,
         name: name,
         source: model,
         options: options,
         made_at: Record.now()
       }}
    end
  end

  defp given(known, names),
    do: for(name <- names, value = known[name], into: %{}, do: {Atom.to_string(name), value})

  @doc """
  What `to:` asks for, as a list of a format and its options: a map, a word, or nil.

      iex> VLLM.Job.Quantize.asked(gguf: ["Q4_K_M", "Q8_0"], awq: [], gptq: [bits: 4])
      {:ok, [["gguf", "Q4_K_M"], ["gguf", "Q8_0"], ["awq", nil], ["gptq", %{"bits" => 4}]]}

      iex> VLLM.Job.Quantize.asked(["gguf:Q4_K_M", :awq])
      {:ok, [["gguf", "Q4_K_M"], ["awq", nil]]}
  """
  @spec asked(term()) :: {:ok, [[term()]]} | {:error, Error.t()}
  def asked(to) do
    with {:ok, lists} <- Params.map(list(to), &outputs/1) do
      case Enum.concat(lists) do
        [] -> {:error, no_outputs()}
        outputs -> {:ok, outputs}
      end
    end
  end

  defp list(to) when is_map(to) and not is_struct(to), do: Map.to_list(to)
  defp list(to) when is_list(to), do: to
  defp list(to), do: [to]

  defp outputs(format) when is_atom(format) and format not in [nil, true, false],
    do: {:ok, [[Atom.to_string(format), nil]]}

  defp outputs(format) when is_binary(format) and format != "" do
    case String.split(format, ":", parts: 2) do
      [format] -> {:ok, [[format, nil]]}
      [format, word] -> {:ok, [[format, word]]}
    end
  end

  defp outputs({format, options}) when is_atom(format) or is_binary(format) do
    format = to_string(format)

    cond do
      options in [nil, []] ->
        {:ok, [[format, nil]]}

      # Several of one format.
      is_list(options) and not Keyword.keyword?(options) and not match?([{_, _} | _], options) ->
        Params.map(options, &one(format, &1))

      true ->
        with {:ok, one} <- one(format, options), do: {:ok, [one]}
    end
  end

  defp outputs(other), do: {:error, not_a_format(other)}

  defp one(format, word) when is_binary(word) and word != "", do: {:ok, [format, word]}

  defp one(format, word) when is_atom(word) and word not in [nil, true, false],
    do: {:ok, [format, Atom.to_string(word)]}

  defp one(format, options) when is_list(options) or is_map(options) do
    with {:ok, options} <- Options.check(:map, "to: #{format}", options),
         do: {:ok, [format, options]}
  end

  defp one(format, other), do: {:error, not_a_format({format, other})}

  defp no_outputs do
    message =
      "What is the model to be made in? `to:` names formats, such as " <>
        "`to: [gguf: [\"Q4_K_M\", \"Q8_0\"], awq: []]`."

    Error.new(:invalid_option, message, %{"option" => "to"})
  end

  defp not_a_format(other) do
    message =
      "`to` takes formats, with options or a word for them: `[gguf: [\"Q4_K_M\"], gptq: [bits: 4]]` " <>
        "or `[\"gguf:Q4_K_M\", :awq]`; got #{VLLM.Secrets.inspect(other)}."

    Error.new(:invalid_option, message, %{"option" => "to"})
  end

  defp calibration(nil), do: {:ok, nil}

  defp calibration(path) when is_binary(path) do
    with {:ok, path} <- Options.check(:string, :calibration, path),
         do: {:ok, %{"path" => Path.expand(path)}}
  end

  defp calibration([_ | _] = texts) do
    with {:ok, texts} <- Options.check(:wire, :calibration, texts),
         do: {:ok, %{"texts" => texts}}
  end

  defp calibration(other) do
    message =
      "`calibration` must be a list of texts, or the path of a file or folder with texts; got " <>
        "#{VLLM.Secrets.inspect(other)}."

    {:error, Error.new(:invalid_option, message, %{"option" => "calibration"})}
  end

  defp texts(nil), do: {:ok, nil}

  defp texts([_ | _] = texts) do
    with {:ok, texts} <- Params.map(texts, &Options.check(:string, :texts, &1)), do: {:ok, texts}
  end

  defp texts(_other) do
    message = "`texts` must be a list of strings: what the outputs are compared on."
    {:error, Error.new(:invalid_option, message, %{"option" => "texts"})}
  end

  # A folder, and the first part of a name of the registry.
  defp folder(given, model) do
    name = given || model |> Path.basename() |> String.replace(~r/[^A-Za-z0-9._-]/, "-")

    if name =~ ~r/\A[A-Za-z0-9][A-Za-z0-9._-]{0,95}\z/ do
      {:ok, name}
    else
      message =
        "The outputs cannot be called `#{name}`: give a `name:` of letters, digits, `.`, `_` and " <>
          "`-` that begins with a letter or a digit."

      {:error, Error.new(:invalid_option, message, %{"option" => "name"})}
    end
  end

  @doc "What a job would take; `settings` are those of its workers."
  @spec estimate(Record.t(), map()) :: {:ok, Estimate.t()} | {:error, Error.t()}
  def estimate(job, settings) do
    step = check(job, if(File.dir?(job.source), do: job.source))

    with {:ok, python} <- quantizing(settings),
         workers = [python: python, env: Settings.environment(settings)],
         {:ok, asked} <- Session.run(:job, workers, &ask(&1, step)),
         params = %{
           "model" => job.source,
           "options" => job.options["engine"],
           "verify" => job.options["verify"],
           "outputs" => for(one <- asked, do: [one["format"], one["options"], one["tokens"] || 0])
         },
         where = [python: settings.python, env: Settings.environment(settings)],
         {:ok, plan} <- Tools.ask("plan_quantize", params, where),
         do: {:ok, Estimate.new(job.source, asked, plan)}
  end

  @doc "What models can be made in; `settings` are those of the worker that is asked."
  @spec formats(map()) :: {:ok, [map()]} | {:error, Error.t()}
  def formats(settings) do
    with {:ok, python} <- quantizing(settings),
         workers = [python: python, env: settings.env],
         {:ok, formats} <-
           Session.run(:job, workers, &Session.call(&1, "quantize_options", %{}, @look_timeout)),
         do: {:ok, Enum.map(formats, &format/1)}
  end

  defp format(wire) do
    options =
      for option <- wire["options"] do
        type = if option["types"] != [], do: Enum.join(option["types"], " or ")
        about = Fields.take(option, [:name, :default, :allowed, :doc])
        Map.put(about, :type, type)
      end

    wire |> Fields.take([:format, :types, :refused]) |> Map.put(:options, options)
  end

  defp ask(session, step), do: Session.call(session, step.method, step.params, @look_timeout)

  defp quantizing(%{quantize_python: nil}), do: Python.executable(:quantize)
  defp quantizing(%{quantize_python: python}), do: {:ok, python}

  ## Steps

  @impl true
  def next(%Record{memo: memo} = job) do
    cond do
      memo == %{} and not File.exists?(job.source) ->
        check(job, nil)

      job.outputs != [] and not is_map_key(memo, :named) ->
        Steps.names(job, &{job.name, &1.label})

      not is_map_key(memo, :path) ->
        Steps.pull(job)

      not is_map_key(memo, :seen) ->
        Steps.look(job)

      not is_map_key(memo, :checked) ->
        check(job, memo.path)

      not is_map_key(memo, :plan) ->
        plan(job)

      output = Enum.find(job.outputs, &(&1.state not in [:done, :failed])) ->
        next(job, output)

      Enum.any?(job.outputs, &(&1.state == :failed)) ->
        {:error, failure(job.outputs)}

      true ->
        :done
    end
  end

  defp next(job, %Output{state: state} = output) when state in [:waiting, :quantizing],
    do: quantize(job, output)

  defp next(job, %Output{state: :verifying} = output) do
    cond do
      not is_map_key(job.memo, :reference) -> measure_source(job, output)
      not is_map_key(job.memo, {:measured, output.label}) -> measure(job, output)
      true -> compare(job, output)
    end
  end

  defp next(job, %Output{state: :registering} = output), do: register(job, output)

  defp check(job, path) do
    %Step{
      name: :check,
      state: :preparing,
      at: :quantize,
      method: "quantize_formats",
      params: with_texts(job, %{"outputs" => job.options["to"], "source" => path})
    }
  end

  defp plan(job) do
    asked =
      for output <- unfinished(job),
          do: [output.format, output.options, job.memo.checked[output.label]]

    %Step{
      name: :plan,
      state: :preparing,
      at: :tools,
      method: "plan_quantize",
      params: %{"model" => job.memo.path, "outputs" => asked}
    }
  end

  defp quantize(job, output) do
    %Step{
      name: :quantize,
      state: :quantizing,
      output: output.label,
      output_state: :quantizing,
      before: Steps.unchanged(job),
      memory: foreseen(job, output.label, "memory"),
      disk: foreseen(job, output.label, "disk"),
      at: :quantize,
      method: "quantize",
      params:
        with_texts(job, %{
          "source" => job.memo.path,
          "format" => output.format,
          "options" => Map.put(output.options, "as", output.label),
          "out" => made(job, output),
          # Of which several outputs are made.
          "work" => Path.join(Store.tmp(job.id), ".work")
        })
    }
  end

  defp with_texts(job, params) do
    job.options
    |> Map.take(["calibration", "max_samples", "max_length"])
    |> Map.merge(params)
    |> Map.reject(fn {_name, value} -> is_nil(value) end)
  end

  defp measure_source(job, output) do
    measure(job, output, :measure_source, job.memo.path, reference(job), %{
      before: Steps.unchanged(job),
      memory: foreseen(job, :source, "verification")
    })
  end

  defp measure(job, output) do
    measure(job, output, :measure, made(job, output), made(job, output) <> ".measured", %{
      memory: foreseen(job, output.label, "verification")
    })
  end

  # Nothing where there is no plan.
  defp foreseen(job, what, size), do: job.memo.plan[what][size] || 0

  defp measure(job, output, name, model, out, rest) do
    step = %Step{
      name: name,
      state: :verifying,
      output: output.label,
      output_state: :verifying,
      at: :serve,
      method: "measure",
      params: %{"model" => model, "texts" => job.options["texts"], "out" => out}
    }

    struct!(step, rest)
  end

  defp compare(job, output) do
    %Step{
      name: :compare,
      state: :verifying,
      output: output.label,
      output_state: :verifying,
      at: :serve,
      method: "compare",
      params: %{"reference" => reference(job), "others" => [made(job, output) <> ".measured"]}
    }
  end

  defp register(job, output) do
    Steps.place(job, output, %{
      "name" => job.name,
      "label" => output.label,
      "quality" => output.quality,
      "made" => %{
        "format" => output.format,
        "calibration" => output.calibration,
        "notes" => output.notes
      }
    })
  end

  defp unfinished(job), do: Enum.reject(job.outputs, &(&1.state == :done))

  defp made(job, output), do: Steps.made(job, output.label)
  defp reference(job), do: Path.join(Store.tmp(job.id), "source.measured")

  ## What came of them

  @impl true
  # The model is looked at once it is here; how many tokens an output reads is then known, too.
  def done(job, %Step{name: :check, params: %{"source" => _path}}, outputs) do
    tokens = Map.new(outputs, &{&1["label"], &1["tokens"] || 0})
    {:ok, job |> planned(outputs) |> Steps.remember(:checked, tokens)}
  end

  def done(job, %Step{name: :check}, outputs),
    do: {:ok, job |> planned(outputs) |> Steps.remember(:asked, true)}

  def done(job, %Step{name: :names}, taken) do
    remedy =
      "Take another `name:`, have the output called something else with `as:` among its options"

    Steps.named(job, taken, remedy)
  end

  def done(job, %Step{name: :pull}, pulled), do: {:ok, Steps.pulled(job, pulled)}

  # Outputs that have their place, and those that have none, are to be of the same model.
  def done(job, %Step{name: :look}, fingerprint) do
    if job.fingerprint not in [nil, fingerprint] and
         Enum.any?(job.outputs, &(&1.state in [:registering, :done])),
       do: {:error, Source.changed(job.memo.path)},
       else: {:ok, Steps.looked(job, fingerprint)}
  end

  def done(job, %Step{name: :plan}, plan) do
    plans = Enum.zip(Enum.map(unfinished(job), & &1.label), plan["outputs"])
    # Of the source there is what its measurement takes.
    source = Map.take(plan, ["verification"])
    {:ok, Steps.remember(job, :plan, Map.new([{:source, source} | plans]))}
  end

  def done(job, %Step{name: :quantize, output: label}, made) do
    state = if job.options["verify"], do: :verifying, else: :registering

    {:ok,
     Record.update_output(job, label, fn output ->
       %{
         output
         | state: state,
           options: made["options"],
           libraries: made["libraries"],
           calibration: made["calibration"],
           notes: made["notes"] || [],
           files: made["files"],
           bytes: made["bytes"],
           seconds: made["seconds"],
           peak_memory_bytes: made["peak_memory_bytes"]
       }
     end)}
  end

  def done(job, %Step{name: :measure_source}, figures),
    do: {:ok, Steps.remember(job, :reference, figures)}

  def done(job, %Step{name: :measure, output: label}, figures) do
    job = Steps.remember(job, {:measured, label}, true)

    # Without a measurement of the source there is nothing to compare with.
    case job.memo.reference do
      {:none, why} ->
        job = Record.update_output(job, label, &%{&1 | notes: &1.notes ++ [why]})
        {:ok, verified(job, label, Map.put(figures, "says", [why]))}

      _figures ->
        {:ok, job}
    end
  end

  # What says something else than its source is no result, whatever it was made with.
  def done(job, %Step{name: :compare, output: label} = step, [row]) do
    case wrong(row) do
      nil -> {:ok, verified(job, label, row)}
      error -> failed(job, step, error)
    end
  end

  def done(job, %Step{name: :publish, output: label}, path),
    do: {:ok, Steps.published(job, label, path)}

  def done(job, %Step{name: :register, output: label}, _model) do
    {:ok, Record.update_output(job, label, &%{&1 | state: :done, name: name(job, &1)})}
  end

  defp wrong(%{"verdict" => "broken"} = row), do: not_verified(row)
  defp wrong(%{"kl_mean" => nil, "verdict" => nil} = row), do: not_verified(row)
  defp wrong(_row), do: nil

  defp not_verified(row) do
    message =
      "What was made is not what it was made of: #{Enum.join(row["says"], " ")} It was removed. " <>
        "Make the model in another format; `verify: false` would keep it all the same."

    Error.new(:not_verified, message, Map.take(row, ["kl_mean", "same_top", "perplexity"]))
  end

  # It was measured where it was made, and has its name soon.
  defp verified(job, label, quality) do
    Record.update_output(job, label, fn output ->
      quality = Map.put(quality, "model", name(job, output))
      %{output | state: :registering, quality: quality}
    end)
  end

  # What is to be made, and what was made already.
  defp planned(job, outputs) do
    before = Map.new(job.outputs, &{&1.label, &1})

    outputs =
      for %{"label" => label, "format" => format, "options" => options} <- outputs do
        Map.get(before, label, %Output{label: label, format: format, options: options})
      end

    %{job | outputs: outputs}
  end

  @impl true
  def failed(job, %Step{name: :measure_source}, error) do
    why = "The source was not measured, so that nothing can be compared with it: #{error.message}"
    {:ok, Steps.remember(job, :reference, {:none, why})}
  end

  # What a step will take is no condition of taking it: what it takes is looked at while it runs.
  def failed(job, %Step{name: :plan}, _error), do: {:ok, Steps.remember(job, :plan, %{})}

  def failed(_job, %Step{output: nil}, error), do: {:error, error}

  def failed(_job, _step, %Error{reason: reason} = error) when reason in @of_all,
    do: {:error, error}

  def failed(job, %Step{output: label}, error) do
    _ = File.rm_rf(Path.join(Store.tmp(job.id), label))
    {:ok, Record.update_output(job, label, &%{&1 | state: :failed, error: error})}
  end

  defp failure([%Output{error: error}]), do: error

  defp failure(outputs) do
    failed = Enum.filter(outputs, &(&1.state == :failed))
    said = Enum.map_join(failed, " ", &"#{&1.label}: #{&1.error.message}")

    message =
      "#{length(failed)} of #{length(outputs)} outputs could not be made. #{said} The others are " <>
        "there; a retry makes those that failed."

    details = %{"outputs" => Map.new(failed, &{&1.label, Atom.to_string(&1.error.reason)})}
    Error.new(hd(failed).error.reason, message, details)
  end

  @impl true
  def again(job), do: Steps.again(job)

  @impl true
  def name(job, output), do: "#{job.name}:#{output.label}"
end
